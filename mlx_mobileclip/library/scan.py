"""Find the image files of a folder, with their sizes and modification times."""

import fnmatch
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..embedding.files import IMAGE_SUFFIXES, Ignored, find_images
from ..errors import DataError
from ..paths import user_path

MAX_MISSING_SHARE = 0.2  # of a folder's files; above this, a disk may not be mounted


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size and modification time of a file, which detect changes."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Source:
    """A folder or a single file to index, by its absolute path."""

    path: bytes
    is_file: bool = False


@dataclass
class ScanResult:
    """The image files of a source.

    Attributes:
        stamps: By absolute path; None if not a regular file, or inaccessible.
        ignored: Counts of ignored files.
        unreadable: Reason for each unreadable folder.
        exists: Whether the source exists.
    """

    stamps: dict[bytes, Stamp | None] = field(default_factory=dict)
    ignored: Ignored = field(default_factory=Ignored)
    unreadable: dict[str, str] = field(default_factory=dict)
    exists: bool = True

    def skip(self, folder: str, reason: str) -> None:
        """Record an unreadable folder."""
        self.unreadable[folder] = reason


def as_source(name: str | os.PathLike[str]) -> Source:
    """Validate a path to index.

    Raises:
        DataError: it is a file but not an image, or its name is empty or has a NUL.
    """
    text = os.fspath(name)
    if not text or "\0" in text:
        raise DataError("a path is empty or has a NUL; give a folder (such as .) or an image")
    path = Path(os.path.abspath(user_path(text)))  # noqa: PTH100 (links are kept)
    if path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(f"{text}: has no image suffix; give a folder or an image")
    return Source(os.fsencode(path), is_file=path.is_file())


def scan(source: Source, exclude: Sequence[str] = ()) -> ScanResult:
    """Find the image files of a source.

    Args:
        source: File, or folder searched recursively as in `embed`. It may not exist.
        exclude: Globs of names or of paths relative to the folder, such as "*.png" or "old/*".
    """
    result = ScanResult()
    name = os.fsdecode(source.path)
    if source.is_file:
        paths = [name]
    elif Path(name).is_dir():
        try:
            paths = find_images(name, result.skip, result.ignored)
        except DataError as error:
            if "contains no image" not in str(error):
                raise
            paths = []
    else:
        result.exists, paths = False, []
    for path in paths:
        relative_path = os.path.relpath(path, name)
        if any(matches_glob(relative_path, pattern) for pattern in exclude):
            result.ignored["excluded"] += 1
            continue
        result.stamps[os.fsencode(path)] = _stamp(path)
    return result


def matches_glob(path: str, pattern: str) -> bool:
    """Whether a glob matches a relative path, one of its components, or a folder above it."""
    parts = path.split("/")
    names = [*parts, *("/".join(parts[: i + 1]) for i in range(len(parts)))]
    return any(fnmatch.fnmatchcase(name, pattern.rstrip("/")) for name in names)


def _stamp(path: str) -> Stamp | None:
    try:
        status = os.stat(path)  # noqa: PTH116 (faster for many files)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return Stamp(status.st_size, status.st_mtime_ns)
