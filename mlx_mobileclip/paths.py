"""Paths as users type them."""

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user typed, with `~` or `~name` at its start replaced by a home directory.

    Where there is no such user it is a file name like any other, and so is `./~x` always; `Path`
    would shorten that to `~x`.
    """
    name = os.path.expanduser(os.fspath(path))  # noqa: PTH111 (never raises)
    return Path.cwd() / name if name.startswith("./~") else Path(name)
