"""Find image files and read lists of lines."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import DataError

IMAGE_SUFFIXES = frozenset(
    # HEIC cannot be decoded, but ignoring it silently would lose half a phone's photos.
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mpo", ".heic", ".heif")
)


def find_images(source: str, on_skip: Callable[[str, str], None] | None = None) -> list[str]:
    """List the image files of a directory, a glob, a list file, or a single image.

    Args:
        source: A directory is searched recursively for image files, except hidden ones; a glob
            may use `**`; a list file has one path per line, relative to the current directory.
        on_skip: Called with the path of each subdirectory that cannot be read, and the reason;
            by default an unreadable subdirectory is an error.

    Returns:
        Paths: sorted for a directory or a glob, in the order of the file for a list.

    Raises:
        DataError: the source does not exist, holds no image, or cannot be read.
    """
    path = _expand(source)
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    if path.is_dir():
        files = _walk(path, on_skip)
        found = [_literal(str(file)) for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise DataError(f"{source}: holds no image; looked for {kinds}")
        return found
    if path.is_file():
        is_image = path.suffix.lower() in IMAGE_SUFFIXES
        return [_literal(str(path))] if is_image else _read_list(path)
    if glob.has_magic(source):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (the glob may be absolute)
        found = sorted(_literal(match) for match in matches if Path(match).is_file())
        if not found:
            raise DataError(f"{source}: no file matches; put a glob in quotes")
        return found
    raise DataError(f"{source}: no such file or directory; give a directory, a glob or a list")


def read_lines(path: Path) -> list[str]:
    """Read the lines of a file; bytes that are not UTF-8 become surrogates.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        text = _expand(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def openable(path: str) -> str:
    """Make a path from `find_images` safe for `Path.expanduser`.

    `Path` drops the ./ that `find_images` puts before a ~, so that the ~ would be expanded.
    """
    return str(Path.cwd() / path) if path.startswith("./~") else path


def _expand(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~ of an unknown user: a file name such as ~$a.png
        return Path(path)


def _literal(path: str) -> str:
    """Keep a ~ at the start of a file name from being expanded to a home directory."""
    return f"./{path}" if path.startswith("~") else path


def _walk(directory: Path, on_skip: Callable[[str, str], None] | None) -> Iterator[Path]:
    def failed(error: OSError) -> None:
        folder, reason = str(error.filename), f"cannot be read ({error.strerror or error})"
        if on_skip is None or folder == str(directory):
            raise DataError(f"{folder}: {reason}") from error
        on_skip(folder, reason)

    for folder, folders, files in os.walk(directory, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _read_list(path: Path) -> list[str]:
    names = [name for name in read_lines(path) if name.strip()]
    if not names or any("\0" in name for name in names):
        raise DataError(f"{path}: is no list of images; write one path a line")
    return names
