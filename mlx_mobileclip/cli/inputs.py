"""Find the images that the options name, and say on stderr what was left out."""

import os

from ..embedding.files import PassedOver, find_images
from ..paths import user_path
from ..terminal import say


def folders_among(sources: list[str]) -> list[str]:
    """The sources that are directories, named as the paths that `find_images` finds there."""
    return [str(user_path(s)) for s in sources if os.path.isdir(user_path(s))]  # noqa: PTH112


def find_all_images(sources: list[str]) -> tuple[list[str], int]:
    """Find the images of all sources; see `find_images`.

    Returns:
        Paths in the order of the sources, and the number of folders that cannot be read, each
        named on stderr. One more line there counts what was passed over.

    Raises:
        DataError: a source does not exist, holds no image, or cannot be read.
    """
    unreadable: set[str] = set()
    passed_over = PassedOver()

    def skip(folder: str, reason: str) -> None:
        if folder not in unreadable:
            say(f"skipped {folder}: {reason}")
        unreadable.add(folder)

    paths = [path for source in sources for path in find_images(source, skip, passed_over)]
    if passed_over:
        say(str(passed_over))
    return paths, len(unreadable)
