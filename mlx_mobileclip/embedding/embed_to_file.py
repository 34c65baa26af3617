"""Embed any number of images or texts into one file.

The output is written atomically. Until then finished rows are kept in a resume log beside it
(resume_log.py), from which the next run continues. A finished output can be updated.
"""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..models.clip import MobileCLIP
from ..paths import user_path
from ..preprocess.processor import Processor
from ..terminal import Bar
from .identity import image_identity, text_identity
from .pipeline import Embedded, check_sequence, iter_embeddings, iter_text_embeddings
from .progress import consume
from .readers import Stored, read_embeddings
from .resume_log import REMEDY, Key, ResumeLog
from .writers import check_names, check_output, write_embeddings


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of a run.

    Attributes:
        total: Inputs given.
        embedded: Inputs in the output.
        resumed: Distinct inputs whose rows came from the resume log.
        skipped: Error message of each skipped input, by name.
        kept: Distinct inputs whose rows were already in the output.
        dropped: Names removed from the output because their files are gone or unreadable.
    """

    total: int
    embedded: int = 0
    resumed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    kept: int = 0
    dropped: int = 0


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
    update: bool = False,
    directories: Sequence[str] = (),
) -> Summary:
    """Embed image files into one file; unreadable images are reported on stderr and skipped.

    Args:
        model: Model with an image tower.
        processor: The model's processor.
        paths: Image files.
        output: File to create; its suffix selects the format (writers.py). It contains
            `embeddings`, float32 (N, E) with unit rows; `names`, the paths in the order of
            `paths`; and `stamps`, size and mtime of each file, by which an update finds changes.
        name: Model name stored in the output.
        batch_size: Images per forward pass.
        workers: Decoding threads; by default one per core, at most 8.
        quiet: Do not show progress; skipped images are still reported.
        update: Update an existing output: embed new and changed files, drop deleted ones, keep
            the rest. Rows of files that are not in `paths` are kept, after those of `paths`,
            unless the file is gone but its folder still exists; if the folder is gone too, the
            disk may just not be mounted.
        directories: Folders that were searched for `paths`; files missing from them are dropped
            even if their folder is gone.

    Raises:
        DataError: the output cannot be written, was made with another model, or no image could
            be embedded.
    """
    check_sequence(paths, "paths")
    stamps = {path: _stamp(path) or "" for path in paths}
    metadata = {"kind": "images", "model": name, "fingerprint": image_identity(model)}
    iterate = partial(iter_embeddings, model, processor, batch_size=batch_size, workers=workers)
    stamp = partial(_stamp_of_other, directories=directories)
    run = partial(_run, iterate, paths, stamps, Path(output), metadata, stamp)
    return run(batch_size=batch_size, quiet=quiet, update=update)


def embed_texts(
    model: MobileCLIP,
    processor: Processor,
    texts: Sequence[str],
    output: str | os.PathLike[str],
    *,
    name: str = "",
    batch_size: int = 128,
    quiet: bool = True,
    update: bool = False,
) -> Summary:
    """Embed texts into one file in the same way as `embed_images`; `names` holds the texts.

    Raises:
        DataError: the output cannot be written, or no text could be embedded.
        ModelError: the model has no text tower.
    """
    metadata = {"kind": "texts", "model": name, "fingerprint": text_identity(model, processor)}
    check_sequence(texts, "texts")
    stamps = dict.fromkeys(texts, "")
    iterate = partial(iter_text_embeddings, model, processor, batch_size=batch_size)
    run = partial(_run, iterate, texts, stamps, Path(output), metadata, lambda _: "")
    return run(batch_size=batch_size, quiet=quiet, update=update)


def _stamp(path: str) -> str | None:
    """Size and mtime of a file, to detect changes; None if it is gone, empty if unknown."""
    try:
        status = user_path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _stamp_of_other(path: str, directories: Sequence[str]) -> str | None:
    """Stamp of a file that is not among the given paths; None if it is certainly gone."""
    stamp, file = _stamp(path), Path(path)
    if stamp is None and not file.parent.is_dir():
        searched = any(file.is_relative_to(directory) for directory in directories)
        return None if searched else ""
    return stamp


def _run(
    iterate: Callable[[list[str]], Generator[Embedded, None, None]],
    names: Sequence[str],
    stamps: dict[str, str],
    output: Path,
    metadata: dict[str, str],
    stamp: Callable[[str], str | None],
    *,
    batch_size: int,
    quiet: bool,
    update: bool,
) -> Summary:
    check_output(output, update=update)
    if update and output.is_symlink():
        output = output.resolve()
    with ResumeLog(output, metadata) as log:
        before = _read_before(output, metadata) if update and output.exists() else None
        rows: dict[Key, NDArray[np.float32]] = {}
        if before is not None:
            rows = dict(zip(before.keys, before.rows, strict=True))
            others = [name for name, _ in before.keys if name not in stamps]
            new_stamps = {name: stamp(name) for name in others}
            others = [name for name in others if new_stamps[name] is not None]
            names = [*names, *others]
            # If the stamp is unknown, the stored row is kept.
            stored = dict(before.keys)
            stamps = stamps | {name: new_stamps[name] or stored[name] for name in others}
        check_names(output, names, list(stamps.values()))
        _check_same_inputs(log, stamps, stamp)

        def store(embedded: list[str], new: NDArray[np.float32]) -> None:
            log.append([(name, stamps[name]) for name in embedded], new)

        # An image row without a stamp may be out of date.
        reusable = {key for key in rows if key[1] or metadata["kind"] == "texts"}
        kept = sum((name, stamps[name]) in reusable for name in stamps)
        pending = [key[0] for key in stamps.items() if key not in log.rows and key not in reusable]
        resumed = len(stamps) - len(pending) - kept
        with Bar(len(stamps), metadata["kind"], quiet=quiet, done=kept + resumed) as bar:
            if resumed and not quiet:
                bar.say(f"resuming from {log.path}: {resumed} of {len(stamps)} are done")
            skipped = consume(iterate(pending), batch_size, bar, store)
        rows = {key: rows[key] for key in reusable} | log.rows
        keys = [(name, stamps[name]) for name in names if (name, stamps[name]) in rows]
        if not keys:
            raise DataError(f"none of the {len(names)} {metadata['kind']} could be embedded")
        if before is None or keys != before.keys:
            values, kept_names = [rows[key] for key in keys], [name for name, _ in keys]
            kept_stamps = [stamp for _, stamp in keys]
            replace = before is not None
            write_embeddings(output, kept_names, values, metadata, kept_stamps, replace=replace)
        log.remove()
    left = {name for name, _ in keys}
    dropped = 0 if before is None else len({name for name, _ in before.keys} - left)
    return Summary(len(names), len(keys), resumed, skipped, kept, dropped)


def _check_same_inputs(
    log: ResumeLog, stamps: Mapping[str, str], stamp: Callable[[str], str | None]
) -> None:
    """Refuse to resume a run with other inputs, because its rows would be lost."""
    names = {name for name, _ in log.rows}
    if names.isdisjoint(stamps) and any(stamp(name) is not None for name in names):
        raise DataError(
            f"{log.path}: contains {len(names)} {log.metadata['kind']} of an unfinished run with "
            f"other inputs; finish that run, {REMEDY}"
        )


def _read_before(output: Path, metadata: dict[str, str]) -> Stored:
    before = read_embeddings(output)
    if any(before.metadata.get(key) != value for key, value in metadata.items() if key != "model"):
        made_with = (
            f"{before.metadata.get('kind')}, model {before.metadata.get('model') or 'unnamed'}"
        )
        raise DataError(
            f"{output}: was made with other weights, settings or version ({made_with}); choose "
            "another --output"
        )
    return before
