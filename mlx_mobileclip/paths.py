"""Paths as users type them."""

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """Convert a path as typed, replacing `~` or `~name` at its start by a home directory.

    A `~name` without such a user is kept as a file name, and so is `./~x`, which `Path` alone would
    shorten to `~x`.
    """
    name = os.path.expanduser(os.fspath(path))  # noqa: PTH111 (never raises)
    return Path.cwd() / name if name.startswith("./~") else Path(name)
