"""Consume a stream of embeddings, with errors and progress on stderr."""

from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ..terminal import Bar
from .pipeline import Embedded

MAX_NAME = 200  # characters of a name shown in a message


def consume(
    results: Generator[Embedded, None, None],
    batch_size: int,
    bar: Bar,
    store: Callable[[list[str], NDArray[np.float32]], None],
) -> dict[str, str]:
    """Store embeddings batch by batch; inputs that fail are reported and skipped.

    Args:
        results: Generator from `iter_embeddings` or `iter_text_embeddings`; always closed.
        batch_size: Batch size of that generator.
        bar: Progress bar; on Ctrl-C it also prints how much was done.
        store: Called for each batch with N > 0 names and their embeddings (N, E).

    Returns:
        Error messages by name.
    """
    errors = {}
    try:
        with closing(results):
            while batch := list(islice(results, batch_size)):
                rows = {item.name: item.row for item in batch if item.row is not None}
                if rows:
                    store(list(rows), np.stack(list(rows.values())))
                for item in batch:
                    if item.error is not None:
                        message = errors[item.name] = str(item.error)
                        where = "" if item.name in message else f"{item.name[:MAX_NAME]}: "
                        bar.say(f"skipped {where}{message}")
                bar.advance(len(batch))
    except KeyboardInterrupt:
        bar.say(f"{bar.done} of {bar.total} {bar.unit} are done")
        raise
    return errors
