"""Find the images that options name, and report on stderr what was skipped."""

import os

from ..embedding.files import Ignored, find_images
from ..paths import user_path
from ..terminal import say


def directories_in(sources: list[str]) -> list[str]:
    """Directories among the sources, spelled as in the paths that `find_images` returns."""
    return [str(user_path(s)) for s in sources if os.path.isdir(user_path(s))]  # noqa: PTH112


def find_all_images(sources: list[str]) -> tuple[list[str], int]:
    """Find the images of all sources, as `find_images` does.

    Unreadable folders are reported on stderr, and one more line counts the ignored files.

    Returns:
        Paths in the order of the sources, and the number of unreadable folders.

    Raises:
        DataError: a source does not exist, contains no image, or cannot be read.
    """
    unreadable: set[str] = set()
    ignored = Ignored()

    def skip(folder: str, reason: str) -> None:
        if folder not in unreadable:
            say(f"skipped {folder}: {reason}")
        unreadable.add(folder)

    paths = [path for source in sources for path in find_images(source, skip, ignored)]
    if ignored:
        say(str(ignored))
    return paths, len(unreadable)
