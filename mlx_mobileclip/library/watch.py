"""Wait for changes in indexed folders: by file system events, else by polling."""

import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ..terminal import say
from .library import Library

POLL_S = 60.0  # polling interval without watchfiles
DEBOUNCE_MS = 2000  # milliseconds; a file being written changes many times


def changes(library: Library, *, quiet: bool = True) -> Iterator[None]:
    """Yield whenever files may have changed, until Ctrl-C."""
    folders = [folder["path"] for folder in library.status()["folders"]]
    if find_spec("watchfiles") is None:
        if not quiet:
            say(
                f"checking for changes every {POLL_S:.0f} s; to react at once: "
                'pip install "mlx-fastvlm[photos]"'
            )
        while True:
            time.sleep(POLL_S)
            yield
    from watchfiles import watch

    existing = [folder for folder in folders if Path(folder).is_dir()]
    if not quiet:
        say(f"watching {len(existing)} folders; press Ctrl-C to stop")
    index_path = os.fspath(library.path.absolute())
    for events in watch(*existing, debounce=DEBOUNCE_MS, raise_interrupt=True):
        # Ignore changes of the index itself, which may be in a watched folder.
        if any(not path.startswith(index_path) for _, path in events):
            yield
