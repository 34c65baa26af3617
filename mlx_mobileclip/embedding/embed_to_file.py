"""Embed any number of images or texts into one file.

The output appears complete or not at all. Until then the rows are in a resume log beside it
(resume_log.py), from which the next run continues.
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..models.clip import MobileCLIP
from ..preprocess.processor import Processor
from ..terminal import Bar
from .files import openable
from .identity import image_identity, text_identity
from .pipeline import Embedded, check_batch_size, iter_embeddings, iter_text_embeddings
from .progress import consume
from .resume_log import ResumeLog
from .writers import check_names, check_output, write_embeddings


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of a run.

    Attributes:
        total: Inputs given.
        embedded: Inputs in the output.
        resumed: Distinct inputs that were taken from the resume log.
        skipped: Error messages of the inputs left out, by name.
    """

    total: int
    embedded: int = 0
    resumed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def embed_images(
    model: MobileCLIP,
    processor: Processor,
    paths: Sequence[str],
    output: str | os.PathLike[str],
    *,
    name: str = "",
    batch_size: int = 32,
    workers: int | None = None,
    quiet: bool = True,
) -> Summary:
    """Embed image files into one file; unreadable images are reported on stderr and skipped.

    Args:
        model: Model with an image tower.
        processor: The model's processor.
        paths: Image files.
        output: File to create; its suffix selects the format (writers.py). It holds
            `embeddings`, float32 (N, E) with unit rows, and `names`, the paths, in the order of
            `paths`.
        name: Name of the model, stored in the output.
        batch_size: Images per forward pass.
        workers: Decoding threads; by default one per core, at most 8.
        quiet: Report skipped images only.

    Raises:
        DataError: the output cannot be written, or no image could be embedded.
    """
    stamps = {path: _stamp(path) for path in paths}
    about = {"kind": "images", "model": name, "fingerprint": image_identity(model)}
    iterate = partial(iter_embeddings, model, processor, batch_size=batch_size, workers=workers)
    return _run(iterate, paths, stamps, Path(output), about, batch_size=batch_size, quiet=quiet)


def embed_texts(
    model: MobileCLIP,
    processor: Processor,
    texts: Sequence[str],
    output: str | os.PathLike[str],
    *,
    name: str = "",
    batch_size: int = 128,
    quiet: bool = True,
) -> Summary:
    """Embed texts into one file in the same way as `embed_images`; `names` holds the texts.

    Raises:
        DataError: the output cannot be written, or no text could be embedded.
        ModelError: the model has no text tower.
    """
    tower, probe = text_identity(model, processor)
    tokenizer = hashlib.sha256(json.dumps(probe).encode()).hexdigest()
    about = {"kind": "texts", "model": name, "fingerprint": tower, "tokenizer": tokenizer}
    stamps = dict.fromkeys(texts, "")
    iterate = partial(iter_text_embeddings, model, processor, batch_size=batch_size)
    return _run(iterate, texts, stamps, Path(output), about, batch_size=batch_size, quiet=quiet)


def _stamp(path: str) -> str:
    """Size and time of a file, so that a resumed run embeds it again if it has changed."""
    try:
        status = Path(openable(path)).expanduser().stat()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: ~ of an unknown user
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _run(
    iterate: Callable[[list[str]], Generator[Embedded, None, None]],
    names: Sequence[str],
    stamps: dict[str, str],
    output: Path,
    about: dict[str, str],
    *,
    batch_size: int,
    quiet: bool,
) -> Summary:
    check_batch_size(batch_size)
    check_output(output)
    check_names(output, list(names))
    with ResumeLog(output, about) as log:

        def store(embedded: list[str], rows: NDArray[np.float32]) -> None:
            log.append([(name, stamps[name]) for name in embedded], rows)

        todo = [name for name, stamp in stamps.items() if (name, stamp) not in log.rows]
        done = len(stamps) - len(todo)
        with Bar(len(stamps), about["kind"], quiet=quiet, done=done) as bar:
            if done and not quiet:
                bar.say(f"going on from {log.path}: {done} of {len(stamps)} are done")
            skipped = consume(iterate(todo), batch_size, bar, store)
        kept = [name for name in names if (name, stamps[name]) in log.rows]
        if not kept:
            log.remove()
            raise DataError(f"none of the {len(names)} {about['kind']} could be embedded")
        write_embeddings(output, kept, [log.rows[name, stamps[name]] for name in kept], about)
        log.remove()
    return Summary(len(names), len(kept), done, skipped)
