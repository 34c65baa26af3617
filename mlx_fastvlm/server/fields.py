"""Read the JSON object of a request field by field."""

import math
from collections.abc import Collection
from typing import Any

from mlx_mobileclip.terminal import printable

from .errors import ApiError, bad

MAX_SHOWN = 60  # characters of a name or value in an error


class Fields:
    """A JSON object whose fields are checked for type and range when read.

    A null field counts as absent; OpenAI's clients send such fields.
    """

    def __init__(self, values: Any, where: str = ""):
        """Wrap a value, which must be an object; `where` is its name in errors."""
        if not isinstance(values, dict):
            raise bad(f"{where or 'the request'} must be a JSON object", where or None)
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        """Return the full name of a field."""
        key = printable(key[:MAX_SHOWN])
        return f"{self._where}.{key}" if self._where else key

    def error(self, key: str, problem: str) -> ApiError:
        """Return the error for a field."""
        return bad(f"{self.name(key)} {problem}", self.name(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value unchecked."""
        self._read.add(key)
        return self._values.get(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; required unless there is a default."""
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {shown(value)}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {shown(value)}")
        return value

    def integer(self, key: str, low: int, high: int) -> int | None:
        """Return an integer in [low, high]; None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"must be an integer from {low} to {high}, not {shown(value)}")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        """Return a number in [low, high]."""
        value = self.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # also refuses NaN
            raise self.error(key, f"must be a number from {low} to {high}, not {shown(value)}")
        return float(value)

    def choice(self, key: str, allowed: Collection[str], default: str) -> str:
        """Return a string that is one of those allowed."""
        value = self.text(key, default)
        if value not in allowed:
            raise self.error(key, f"must be {' or '.join(allowed)}, not {shown(value)}")
        return value

    def items(self, key: str, max_count: int) -> list[Any]:
        """Return a list of 1 to `max_count` values."""
        value = self.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, list):
            raise self.error(key, f"must be a list, not {shown(value)}")
        if not 1 <= len(value) <= max_count:
            raise self.error(key, f"has {len(value)} entries; give 1 to {max_count}")
        return value

    def texts(self, key: str, max_count: int) -> list[str]:
        """Return a list of 1 to `max_count` strings."""
        values = self.items(key, max_count)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise self.error(f"{key}[{i}]", f"must be a string, not {shown(value)}")
        return values

    def ignore(self, *keys: str) -> None:
        """Accept fields that have no effect here."""
        self._read.update(keys)

    def refuse(self, key: str, neutral: Collection[Any] = ()) -> None:
        """Refuse an unsupported feature, unless its value is one of the neutral ones."""
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
                f"{self.name(unknown[0])} is not a known field; leave it out",
                self.name(unknown[0]),
                "unknown_parameter",
            )


def shown(value: Any) -> str:
    """Format a value for an error: short, without the contents of lists and objects."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "a very large integer"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "a non-finite number"
    if isinstance(value, str):
        return repr(value[:MAX_SHOWN])
    return "a list" if isinstance(value, list) else "an object"


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal; 1 and true are not."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
