"""Find image files: in directories, by globs, and in lists."""

import glob
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import DataError
from ..paths import user_path
from .lines import read_lines

IMAGE_SUFFIXES = frozenset(
    # Some, such as HEIC, may not be decodable; those are reported and skipped.
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo"),
        *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl"),
    )
)
# Magic bytes of the formats that image.py opens, to distinguish an image from a list.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"MM\0+", b"II+\0")
MAX_REASONS = 8  # listed in a summary


class Ignored(Counter[str]):
    """Counts of the files and folders that a search ignored, by reason."""

    def __str__(self) -> str:
        """Summary such as "ignored 3: 2 .txt, 1 hidden"; empty if nothing was ignored."""
        if not self:
            return ""
        reasons = [f"{count} {reason}" for reason, count in self.most_common(MAX_REASONS)]
        if others := self.total() - sum(count for _, count in self.most_common(MAX_REASONS)):
            reasons.append(f"{others} others")
        return f"ignored {self.total()}: {', '.join(reasons)}"


def find_images(
    source: str,
    on_skip: Callable[[str, str], None] | None = None,
    ignored: Ignored | None = None,
) -> list[str]:
    """List the image files of a directory, a glob, a list file, or a single image.

    Args:
        source: A directory is searched recursively for image files, except hidden ones; linked
            folders are searched last, and each folder only once. A glob may use `**`. A list
            file has one path per line, relative to the current directory.
        on_skip: Called with the path of each unreadable subdirectory, and the reason; by default
            an unreadable subdirectory is an error.
        ignored: Updated with the counts of ignored files and folders.

    Returns:
        Paths: sorted for a directory or a glob, in the order of the file for a list.

    Raises:
        DataError: the source does not exist, contains no image, or cannot be read.
    """
    if not source:
        raise DataError("the name is empty; give a directory (such as .), a glob or a list")
    path = user_path(source)
    ignored = Ignored() if ignored is None else ignored
    # os.path returns False for what cannot be accessed, where Path raises.
    if os.path.isdir(path):  # noqa: PTH112
        found = [_without_tilde(str(file)) for file in _images_below(path, on_skip, ignored)]
        if not found:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            details = f" ({ignored})" if ignored else ""
            raise DataError(f"{source}: contains no image{details}; looked for {kinds}")
        return found
    if os.path.isfile(path):  # noqa: PTH113
        return [_without_tilde(str(path))] if _is_image(path) else _read_list(path)
    if glob.has_magic(source):
        found = [_without_tilde(match) for match in _files_matching(str(path), ignored)]
        if not found:
            raise DataError(f"{source}: no file matches; quote the glob for the shell")
        return found
    raise DataError(
        f"{source[:200]}: no such file or directory, or no permission; give a directory, a glob "
        "or a list"
    )


def _without_tilde(path: str) -> str:
    """Prevent a ~ at the start of a file name from being expanded to a home directory."""
    return f"./{path}" if path.startswith("~") else path


def _files_matching(pattern: str, ignored: Ignored) -> list[str]:
    """Sorted files that match a glob; each `**` visits every folder once, as in `_walk_once`."""
    first, *rest = [part.strip("/") for part in re.split(r"(?:(?<=/)|^)\*\*(?=/|$)", pattern)]
    if not rest:
        matches = glob.glob(pattern)  # noqa: PTH207 (the glob may be absolute)
        files = [match for match in matches if not os.path.isdir(match)]  # noqa: PTH112
        if len(matches) > len(files):
            ignored["folders that match a glob"] += len(matches) - len(files)
        return sorted(files)

    def unreadable(_: OSError) -> None:
        ignored["folders that cannot be read"] += 1

    root = "/" if pattern.startswith("/") else ""
    bases = glob.glob(f"{root}{first}/") if root or first else ["."]  # noqa: PTH207
    for between in rest[:-1]:
        folders = [folder for folder, _ in _walk_once(bases, unreadable, Ignored())]
        bases = [base for folder in folders for base in _folders_within(folder, between)]
    found: set[str] = set()
    for folder, _ in _walk_once(bases, unreadable, ignored):
        inner = Ignored()  # not counted: `_walk_once` visits the subfolders itself
        found.update(_files_matching(str(Path(glob.escape(folder), rest[-1] or "*")), inner))
    return sorted(found)


def _folders_within(folder: str, pattern: str) -> list[str]:
    """Folders that match a glob within a folder; the folder itself if the glob is empty."""
    return glob.glob(f"{glob.escape(folder)}/{pattern}/") if pattern else [folder]  # noqa: PTH207


def _is_image(path: Path) -> bool:
    """Whether a file is an image rather than a list, by its suffix or its first bytes."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False  # reported when it is read as a list
    bitmap = start[:2] == b"BM" and start[6:10] == bytes(4)
    return start.startswith(SIGNATURES) or start[4:8] == b"ftyp" or bitmap


def _images_below(
    directory: Path, on_skip: Callable[[str, str], None] | None, ignored: Ignored
) -> Iterator[Path]:
    """Image files of a directory and its subfolders."""

    def on_error(error: OSError) -> None:
        folder, reason = str(error.filename), f"cannot be read ({error.strerror or error})"
        if on_skip is None or folder == str(directory):
            raise DataError(f"{folder}: {reason}") from error
        on_skip(folder, reason)

    for folder, files in _walk_once([str(directory)], on_error, ignored):
        for name in sorted(files):
            path = Path(folder, name)
            if reason := _reason_to_ignore(path):
                ignored[reason] += 1
            else:
                yield path


def _walk_once(
    directories: Sequence[str], on_error: Callable[[OSError], None], ignored: Ignored
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below the directories with its files; real folders first, then links.

    Each folder is visited once, so loops of links end. Folders reached without a link come first,
    so that the path of a file does not depend on links to it.
    """
    visited: set[tuple[int, int] | str] = set()
    pending = deque(
        sorted(map(Path, directories), key=lambda path: path.resolve() != path.absolute())
    )
    while pending:
        start = pending.popleft()
        if _inode(start) in visited:
            ignored["linked folders that were searched already"] += 1
            continue
        for folder, folders, files in os.walk(start, onerror=on_error):
            visited.add(_inode(folder))
            for name in sorted(folders):
                path = Path(folder, name)
                if name.startswith("."):
                    ignored["hidden folders"] += 1
                elif os.path.islink(path):  # noqa: PTH114
                    pending.append(path)
                elif _inode(path) in visited:
                    ignored["folders that were searched already"] += 1
                else:
                    continue
                folders.remove(name)
            folders.sort()
            yield folder, files


def _reason_to_ignore(path: Path) -> str:
    """Reason why a file in a directory is ignored; empty if it is an image."""
    if path.name.startswith("."):
        return "hidden"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ""  # also a broken link, which is reported as skipped
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114
        return "broken links"
    return path.suffix.lower() or "without a suffix"


def _inode(folder: str | Path) -> tuple[int, int] | str:
    """Device and inode, which are the same for all names of a folder."""
    try:
        status = Path(folder).stat()
    except OSError:  # deleted meanwhile, or unreachable: os.walk reports it
        return str(folder)
    return status.st_dev, status.st_ino


def _read_list(path: Path) -> list[str]:
    names = [name for name in read_lines(path, paths=True) if name.strip()]
    if not names:
        raise DataError(f"{path}: is not a list of images; write one path per line")
    return names
