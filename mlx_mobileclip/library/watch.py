"""Wait for changes in the folders of an index: by the system's notice, else by looking again."""

import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ..terminal import say
from .library import Library

LOOK_AGAIN_S = 60.0  # without watchfiles
QUIET_MS = 2000  # files that are being written change many times


def changes(library: Library, *, quiet: bool = True) -> Iterator[None]:
    """Yield whenever something may have changed; ends on Ctrl-C."""
    folders = [folder["path"] for folder in library.status()["folders"]]
    if find_spec("watchfiles") is None:
        if not quiet:
            say(
                f"looking again every {LOOK_AGAIN_S:.0f} s; to be told of changes: "
                'pip install "mlx-fastvlm[photos]"'
            )
        while True:
            time.sleep(LOOK_AGAIN_S)
            yield
    from watchfiles import watch

    there = [folder for folder in folders if Path(folder).is_dir()]
    if not quiet:
        say(f"watching {len(there)} folders; Ctrl-C ends it")
    own = os.fspath(library.path.absolute())
    for changed in watch(*there, debounce=QUIET_MS, raise_interrupt=True):
        # The index may be in a folder of photos; its own changes would never end.
        if any(not path.startswith(own) for _, path in changed):
            yield
