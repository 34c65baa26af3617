"""Read the JSON object of a request field by field."""

import math
from collections.abc import Collection
from typing import Any

from mlx_mobileclip.terminal import printable

from .errors import ApiError, bad

SHOWN = 60  # characters of a name or value in an error


class Fields:
    """A JSON object whose fields are read with checks of type and range.

    A field that is null counts as absent, as OpenAI's clients send it.
    """

    def __init__(self, values: Any, where: str = ""):
        """Take a value, which must be an object; `where` is its name in errors."""
        if not isinstance(values, dict):
            raise bad(f"{where or 'the request'} must be a JSON object", where or None)
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        """The full name of a field."""
        key = printable(key[:SHOWN])
        return f"{self._where}.{key}" if self._where else key

    def error(self, key: str, problem: str) -> ApiError:
        """The error for a field."""
        return bad(f"{self.name(key)} {problem}", self.name(key))

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        self._read.add(key)
        return self._values.get(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        """A text; required unless there is a default."""
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, str):
            raise self.error(key, f"must be a text, not {shown(value)}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {shown(value)}")
        return value

    def integer(self, key: str, low: int, high: int) -> int | None:
        """An integer in [low, high]; None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"must be an integer from {low} to {high}, not {shown(value)}")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        """A finite number in [low, high]."""
        value = self.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # also refuses NaN
            raise self.error(key, f"must be a number from {low} to {high}, not {shown(value)}")
        return float(value)

    def choice(self, key: str, allowed: Collection[str], default: str) -> str:
        """One of some texts."""
        value = self.text(key, default)
        if value not in allowed:
            raise self.error(key, f"must be {' or '.join(allowed)}, not {shown(value)}")
        return value

    def items(self, key: str, most: int) -> list[Any]:
        """A list of 1 to `most` values."""
        value = self.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, list):
            raise self.error(key, f"must be a list, not {shown(value)}")
        if not 1 <= len(value) <= most:
            raise self.error(key, f"has {len(value)} entries; give 1 to {most}")
        return value

    def texts(self, key: str, most: int) -> list[str]:
        """A list of 1 to `most` texts."""
        values = self.items(key, most)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise self.error(f"{key}[{i}]", f"must be a text, not {shown(value)}")
        return values

    def ignore(self, *keys: str) -> None:
        """Accept fields that have no effect here."""
        self._read.update(keys)

    def refuse(self, key: str, neutral: Collection[Any] = ()) -> None:
        """Refuse a feature that is not offered, unless its value means that it is not wanted."""
        value = self.get(key)
        if value is not None and not any(_same(value, other) for other in neutral):
            raise bad(
                f"{self.name(key)} {shown(value)} is not supported; leave it out",
                self.name(key),
                "unsupported_parameter",
            )

    def end(self) -> None:
        """Refuse fields that were not read."""
        if unknown := [key for key in self._values if key not in self._read]:
            raise bad(
                f"{self.name(unknown[0])} is not a field that this server knows; leave it out",
                self.name(unknown[0]),
                "unknown_parameter",
            )


def shown(value: Any) -> str:
    """A value in an error: short, and without what could be private."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "an integer of many digits"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "a number that is not finite"
    if isinstance(value, str):
        return repr(value[:SHOWN])
    return "a list" if isinstance(value, list) else "an object"


def _same(value: Any, other: Any) -> bool:
    """Whether they are equal; 1 and true are not."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
