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
    # Not all can be decoded, such as HEIC, but then the user is told which are skipped.
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo"),
        *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl"),
    )
)
# First bytes of the formats that image.py opens, to tell an image from a list.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"MM\0+", b"II+\0")
MAX_KINDS = 8  # that a summary names


class PassedOver(Counter[str]):
    """How many files and folders a search left out, by reason."""

    def __str__(self) -> str:
        """Such as "passed over 3: 2 .txt, 1 hidden"; empty if nothing was."""
        if not self:
            return ""
        kinds = [f"{count} {reason}" for reason, count in self.most_common(MAX_KINDS)]
        if others := self.total() - sum(count for _, count in self.most_common(MAX_KINDS)):
            kinds.append(f"{others} others")
        return f"passed over {self.total()}: {', '.join(kinds)}"


def find_images(
    source: str,
    on_skip: Callable[[str, str], None] | None = None,
    passed_over: PassedOver | None = None,
) -> list[str]:
    """List the image files of a directory, a glob, a list file, or a single image.

    Args:
        source: A directory is searched recursively for image files, except hidden ones; folders
            that are links follow after the others, each folder once. A glob may use `**`. A list
            file has one path per line, relative to the current directory.
        on_skip: Called with the path of each subdirectory that cannot be read, and the reason;
            by default an unreadable subdirectory is an error.
        passed_over: Counts what was left out.

    Returns:
        Paths: sorted for a directory or a glob, in the order of the file for a list.

    Raises:
        DataError: the source does not exist, holds no image, or cannot be read.
    """
    if not source:
        raise DataError("an empty name; give a directory (. for this one), a glob or a list")
    path = user_path(source)
    passed_over = PassedOver() if passed_over is None else passed_over
    # os.path returns False for what cannot be accessed, where Path raises.
    if os.path.isdir(path):  # noqa: PTH112
        found = [_literal(str(file)) for file in _walk(path, on_skip, passed_over)]
        if not found:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            left_out = f" ({passed_over})" if passed_over else ""
            raise DataError(f"{source}: holds no image{left_out}; looked for {kinds}")
        return found
    if os.path.isfile(path):  # noqa: PTH113
        return [_literal(str(path))] if _is_image(path) else _read_list(path)
    if glob.has_magic(source):
        found = [_literal(match) for match in _match(str(path), passed_over)]
        if not found:
            raise DataError(f"{source}: no file matches; put a glob in quotes")
        return found
    raise DataError(
        f"{source[:200]}: no such file or directory, or no access to it; give a directory, a glob "
        "or a list"
    )


def _literal(path: str) -> str:
    """Keep a ~ at the start of a file name from being expanded to a home directory."""
    return f"./{path}" if path.startswith("~") else path


def _match(pattern: str, passed_over: PassedOver) -> list[str]:
    """The files that match a glob, sorted; each `**` searches every folder once, as `_search`."""
    first, *rest = [part.strip("/") for part in re.split(r"(?:(?<=/)|^)\*\*(?=/|$)", pattern)]
    if not rest:
        matches = glob.glob(pattern)  # noqa: PTH207 (the glob may be absolute)
        files = [match for match in matches if not os.path.isdir(match)]  # noqa: PTH112
        if len(matches) > len(files):
            passed_over["folders that match a glob"] += len(matches) - len(files)
        return sorted(files)

    def unreadable(_: OSError) -> None:
        passed_over["folders that cannot be read"] += 1

    root = "/" if pattern.startswith("/") else ""
    bases = glob.glob(f"{root}{first}/") if root or first else ["."]  # noqa: PTH207
    for between in rest[:-1]:
        folders = [folder for folder, _ in _search(bases, unreadable, PassedOver())]
        bases = [base for folder in folders for base in _folders_within(folder, between)]
    found: set[str] = set()
    for folder, _ in _search(bases, unreadable, passed_over):
        inner = PassedOver()  # the folders within this one are searched in their turn
        found.update(_match(str(Path(glob.escape(folder), rest[-1] or "*")), inner))
    return sorted(found)


def _folders_within(folder: str, pattern: str) -> list[str]:
    """The folders that match a glob within a folder; itself if there is none, as in `**/**`."""
    return glob.glob(f"{glob.escape(folder)}/{pattern}/") if pattern else [folder]  # noqa: PTH207


def _is_image(path: Path) -> bool:
    """Whether a file is an image and no list, by its name or else by its first bytes."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False  # reported when it is read as a list
    bitmap = start[:2] == b"BM" and start[6:10] == bytes(4)
    return start.startswith(SIGNATURES) or start[4:8] == b"ftyp" or bitmap


def _walk(
    directory: Path, on_skip: Callable[[str, str], None] | None, passed_over: PassedOver
) -> Iterator[Path]:
    """The image files of a directory and its folders."""

    def failed(error: OSError) -> None:
        folder, reason = str(error.filename), f"cannot be read ({error.strerror or error})"
        if on_skip is None or folder == str(directory):
            raise DataError(f"{folder}: {reason}") from error
        on_skip(folder, reason)

    for folder, files in _search([str(directory)], failed, passed_over):
        for name in sorted(files):
            path = Path(folder, name)
            if reason := _reason_to_pass_over(path):
                passed_over[reason] += 1
            else:
                yield path


def _search(
    directories: Sequence[str], failed: Callable[[OSError], None], passed_over: PassedOver
) -> Iterator[tuple[str, list[str]]]:
    """Directories and their folders, each with its files; first the real folders, then the links.

    What is reached without a link is never left out, so that a file keeps its name whatever links
    lead to it. A folder that was searched before is left out: a loop ends.
    """
    searched: set[tuple[int, int] | str] = set()
    left = deque(sorted(map(Path, directories), key=lambda path: path.resolve() != path.absolute()))
    while left:
        start = left.popleft()
        if _identity(start) in searched:
            passed_over["linked folders that were searched already"] += 1
            continue
        for folder, folders, files in os.walk(start, onerror=failed):
            searched.add(_identity(folder))
            for name in sorted(folders):
                path = Path(folder, name)
                if name.startswith("."):
                    passed_over["hidden folders"] += 1
                elif os.path.islink(path):  # noqa: PTH114
                    left.append(path)
                elif _identity(path) in searched:
                    passed_over["folders that were searched already"] += 1
                else:
                    continue
                folders.remove(name)
            folders.sort()
            yield folder, files


def _reason_to_pass_over(path: Path) -> str:
    """Why a file of a directory is no image to embed; empty if it is one."""
    if path.name.startswith("."):
        return "hidden"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ""  # a broken link too: it is skipped by name
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114
        return "broken links"
    return path.suffix.lower() or "without a suffix"


def _identity(folder: str | Path) -> tuple[int, int] | str:
    """What is the same for all names of a folder."""
    try:
        status = Path(folder).stat()
    except OSError:  # it has gone meanwhile, or cannot be reached: os.walk reports it
        return str(folder)
    return status.st_dev, status.st_ino


def _read_list(path: Path) -> list[str]:
    names = [name for name in read_lines(path, paths=True) if name.strip()]
    if not names:
        raise DataError(f"{path}: is no list of images; write one path a line")
    return names
