"""Read small files and JSON objects of a checkpoint as hostile input: bounded, type-checked."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError, refuse_lfs_pointer

MAX_CONFIG_BYTES = 1 << 20
COMMIT = re.compile(r"[0-9a-f]{40}")


class Fields:
    """One JSON object of a checkpoint, read field by field with type and range checks."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def error(self, key: str, problem: str) -> ConfigError:
        """The error for a field that cannot be used."""
        return ConfigError(f"{self.where}: {key}: {problem}; the checkpoint cannot be used")

    def get(self, key: str, default: Any = ...) -> Any:
        """The raw value; if absent or null, the default, or ConfigError if there is none."""
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise self.error(key, "is missing")
            return default
        return value

    def has(self, key: str) -> bool:
        """Whether the field is present and not null."""
        return self.values.get(key) is not None

    def object(self, key: str) -> "Fields":
        """A nested object."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "is not an object")
        return Fields(value, f"{self.where}: {key}")

    def check_version(self, known: int) -> None:
        """Raise ConfigError if a canonical config is newer than this program."""
        version = self.integer("format_version", 1, 1 << 20)
        if version > known:
            raise ConfigError(
                f"{self.where}: format_version {version} is newer than this program knows "
                f"({known}); update mlx-fastvlm, or convert the source again"
            )

    def _check(self, key: str, value: Any, kinds: Any, low: float, high: float) -> Any:
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            scalar = isinstance(value, (int, float, str)) and len(repr(value)) < 40
            text = repr(value) if scalar else type(value).__name__
            kind = "an integer" if kinds is int else "a number"
            raise self.error(key, f"{text} is not {kind} from {low} to {high}")
        return value

    def integer(self, key: str, low: int, high: int, default: Any = ...) -> int:
        """An integer within [low, high]."""
        return int(self._check(key, self.get(key, default), int, low, high))

    def number(self, key: str, low: float, high: float, default: Any = ...) -> float:
        """A finite number within [low, high]."""
        return float(self._check(key, self.get(key, default), (int, float), low, high))

    def boolean(self, key: str, default: Any = ...) -> bool:
        """A boolean."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "is not true or false")
        return value

    def string(self, key: str, default: Any = ...) -> str:
        """A string of at most 4096 printable characters."""
        value = self.get(key, default)
        if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
            raise self.error(key, "is not a string of at most 4096 printable characters")
        return value

    def record(self, key: str) -> dict[str, str | None]:
        """An object of strings and nulls; empty if the field is absent."""
        entry = self.object(key) if self.has(key) else Fields({}, self.where)
        return {name: entry.string(name) if entry.has(name) else None for name in entry.values}

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = ...) -> str:
        """One of the allowed strings."""
        value = self.string(key, default)
        if value not in allowed:
            raise self.error(key, f"{value[:40]!r} is not one of {', '.join(allowed)}")
        return value

    def _list(self, key: str, length: int | None, most: int) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, (list, tuple)) or not value or len(value) > most:
            raise self.error(key, f"is not a list of 1 to {most} entries")
        if length is not None and len(value) != length:
            raise self.error(key, f"has {len(value)} entries instead of {length}")
        return list(value)

    def integers(
        self, key: str, low: int, high: int, length: int | None = None, most: int = 64
    ) -> tuple[int, ...]:
        """A list of integers, each within [low, high]."""
        values = self._list(key, length, most)
        return tuple(int(self._check(key, v, int, low, high)) for v in values)

    def numbers(
        self, key: str, low: float, high: float, length: int | None = None
    ) -> tuple[float, ...]:
        """A list of numbers, each within [low, high]."""
        values = self._list(key, length, 64)
        return tuple(float(self._check(key, v, (int, float), low, high)) for v in values)

    def choices(self, key: str, allowed: tuple[str, ...], length: int) -> tuple[str, ...]:
        """A list of strings, each one of the allowed."""
        values = self._list(key, length, 64)
        return tuple(Fields({key: v}, self.where).choice(key, allowed) for v in values)

    def booleans(self, key: str, length: int) -> tuple[bool, ...]:
        """A list of true and false."""
        values = self._list(key, length, 64)
        return tuple(Fields({key: v}, self.where).boolean(key) for v in values)


def check_link(path: Path) -> None:
    """Check that a file of a checkpoint is not a link to a file elsewhere.

    Following it could publish a private file of the user with a converted checkpoint. A snapshot in
    the Hub's cache may link to the blobs of its repository.

    Args:
        path: The file, directly in the checkpoint's directory.

    Raises:
        CheckpointError: it links to a file outside that directory, or to nothing.
    """
    if not path.is_symlink():
        return
    try:
        real, directory = path.resolve(strict=True), path.parent.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"{path}: is a broken link; download the file again") from error
    if not real.is_relative_to(directory) and real.parent != hub_blobs(directory):
        raise CheckpointError(
            f"{path}: is a link to outside the checkpoint, which is not followed; replace it by a "
            "copy of the file"
        )


def hub_blobs(snapshot: Path) -> Path | None:
    """The directory that a snapshot in the Hub's cache links to; None if this is not a snapshot.

    Args:
        snapshot: Resolved path of any directory.
    """
    snapshots, repository = snapshot.parent, snapshot.parent.parent
    is_snapshot = snapshots.name == "snapshots" and repository.name.startswith("models--")
    return repository / "blobs" if is_snapshot and COMMIT.fullmatch(snapshot.name) else None


def read_bounded(
    path: Path, limit_bytes: int, remark: str = "", *, follow_links: bool = False
) -> bytes:
    """Read a small file whole.

    Args:
        path: The file.
        limit_bytes: Maximum size.
        remark: End of the error message if it is larger.
        follow_links: Allow links to anywhere, as the user named this file; see `check_link`.

    Raises:
        CheckpointError: it is a link to outside its directory, or a Git LFS pointer.
        ConfigError: it is not a regular file, or larger than the limit.
        OSError: it is missing or cannot be read.
    """
    if path.exists() and not path.is_file():  # a pipe could block, a device could be endless
        raise ConfigError(f"{path}: is not a regular file")
    if path.exists() and not follow_links:
        check_link(path)
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ConfigError(f"{path}: larger than {limit_bytes >> 20} MB{remark}")
    refuse_lfs_pointer(data, path)
    return data


def read_json(
    path: Path, limit_bytes: int = MAX_CONFIG_BYTES, *, follow_links: bool = False
) -> dict[str, Any]:
    """Read a JSON object of bounded size; arguments as for `read_bounded`.

    Raises:
        CheckpointError: the file is a link to outside its directory.
        ConfigError: the file is missing, larger than the limit, not JSON, nested too deep, or
            repeats a key (JSON parsers disagree on which value counts).
    """

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    try:
        remark = "; this is not a config file"
        data = read_bounded(path, limit_bytes, remark, follow_links=follow_links)
        value = json.loads(data, object_pairs_hook=reject_duplicates)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path}: not valid JSON ({reason}); download the file again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: is not a JSON object")
    return value
