"""Compare folders with the index: which files are new, changed or gone."""

import fnmatch
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..embedding.files import IMAGE_SUFFIXES, Ignored, find_images
from ..errors import DataError
from ..paths import user_path

VANISHED_SHARE = 0.2  # of a folder's files; more than that looks like a disk that is not mounted


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size and time of a file, by which a change is noticed."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Source:
    """A folder or a single file to index, by its absolute path."""

    path: bytes
    is_file: bool = False


@dataclass
class Found:
    """The image files of a source.

    Attributes:
        stamps: By absolute path; None for a file that cannot be opened as one, such as a pipe.
        ignored: Counts of what was passed over.
        unreadable: Folders that could not be searched, and why.
        is_there: Whether the source exists.
    """

    stamps: dict[bytes, Stamp | None] = field(default_factory=dict)
    ignored: Ignored = field(default_factory=Ignored)
    unreadable: dict[str, str] = field(default_factory=dict)
    is_there: bool = True

    def skip(self, folder: str, reason: str) -> None:
        """Note a folder that could not be searched."""
        self.unreadable[folder] = reason


def as_source(name: str | os.PathLike[str]) -> Source:
    """Check a path that was given to index.

    Raises:
        DataError: it is neither a folder nor an image, or its name is empty.
    """
    text = os.fspath(name)
    if not text or "\0" in text:
        raise DataError("a name is empty or has a NUL; give a folder (such as .) or an image")
    path = Path(os.path.abspath(user_path(text)))  # noqa: PTH100 (links are kept)
    if path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(f"{text}: is not an image by its name; give a folder or an image")
    return Source(os.fsencode(path), is_file=path.is_file())


def scan(source: Source, exclude: Sequence[str] = ()) -> Found:
    """Find the image files of a source.

    Args:
        source: Folder, searched as `embed` does, or file. It may be gone.
        exclude: Globs of names or of paths relative to the folder, such as "*.png" or "old/*".
    """
    found = Found()
    name = os.fsdecode(source.path)
    if source.is_file:
        paths = [name]
    elif Path(name).is_dir():
        try:
            paths = find_images(name, found.skip, found.ignored)
        except DataError as error:
            if "contains no image" not in str(error):
                raise
            paths = []
    else:
        found.is_there, paths = False, []
    for path in paths:
        inside = os.path.relpath(path, name)
        if any(matches(inside, pattern) for pattern in exclude):
            found.ignored["excluded"] += 1
            continue
        found.stamps[os.fsencode(path)] = _stamp(path)
    return found


def matches(path: str, pattern: str) -> bool:
    """Whether a glob fits a relative path, one of its folders, or its name."""
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
