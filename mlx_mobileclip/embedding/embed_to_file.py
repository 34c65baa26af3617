"""Embed any number of images or texts into one file.

The output appears complete or not at all. Until then the rows are in a resume log beside it
(resume_log.py), from which the next run continues. A finished output can be brought up to date.
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
        resumed: Distinct inputs that were taken from the resume log.
        skipped: Error messages of the inputs left out, by name.
        kept: Distinct inputs whose rows were in the output before.
        dropped: Names that were in the output before and are not any more, as the files are gone
            or cannot be read.
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
        output: File to create; its suffix selects the format (writers.py). It holds
            `embeddings`, float32 (N, E) with unit rows, and `names`, the paths, in the order of
            `paths`, and `stamps`, by which an update knows the files that have changed.
        name: Name of the model, stored in the output.
        batch_size: Images per forward pass.
        workers: Decoding threads; by default one per core, at most 8.
        quiet: Report skipped images only.
        update: Bring an output that exists up to date: embed the files that are new or have
            changed since, drop those that are gone, keep the others. Files in it that `paths`
            does not name stay, after those of `paths`, unless they are gone from a folder that is
            still there: if the folder is gone as well, its disk may only be absent.
        directories: Folders that were searched for `paths`; what is gone from them is dropped
            together with its folder.

    Raises:
        DataError: the output cannot be written, is another model's, or no image could be embedded.
    """
    check_sequence(paths, "paths")
    stamps = {path: _stamp(path) or "" for path in paths}
    about = {"kind": "images", "model": name, "fingerprint": image_identity(model)}
    iterate = partial(iter_embeddings, model, processor, batch_size=batch_size, workers=workers)
    stamp = partial(_stamp_of_unnamed, directories=directories)
    run = partial(_run, iterate, paths, stamps, Path(output), about, stamp)
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
    about = {"kind": "texts", "model": name, "fingerprint": text_identity(model, processor)}
    check_sequence(texts, "texts")
    stamps = dict.fromkeys(texts, "")
    iterate = partial(iter_text_embeddings, model, processor, batch_size=batch_size)
    run = partial(_run, iterate, texts, stamps, Path(output), about, lambda _: "")
    return run(batch_size=batch_size, quiet=quiet, update=update)


def _stamp(path: str) -> str | None:
    """Size and time of a file, so that it is embedded again if it has changed; None if it is gone.

    Empty if they cannot be told.
    """
    try:
        status = user_path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _stamp_of_unnamed(path: str, directories: Sequence[str]) -> str | None:
    """Stamp of a file that an update does not name; None if the file is certainly gone."""
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
    about: dict[str, str],
    stamp: Callable[[str], str | None],
    *,
    batch_size: int,
    quiet: bool,
    update: bool,
) -> Summary:
    check_output(output, update=update)
    if update and output.is_symlink():
        output = output.resolve()
    with ResumeLog(output, about) as log:
        before = _read_before(output, about) if update and output.exists() else None
        rows: dict[Key, NDArray[np.float32]] = {}
        if before is not None:
            rows = dict(zip(before.keys, before.rows, strict=True))
            others = [name for name, _ in before.keys if name not in stamps]
            found = {name: stamp(name) for name in others}
            others = [name for name in others if found[name] is not None]
            names = [*names, *others]
            # Where the stamp cannot be told, the row stays as it is.
            stored = dict(before.keys)
            stamps = stamps | {name: found[name] or stored[name] for name in others}
        check_names(output, names, list(stamps.values()))
        _check_same_inputs(log, stamps, stamp)

        def store(embedded: list[str], new: NDArray[np.float32]) -> None:
            log.append([(name, stamps[name]) for name in embedded], new)

        # An image's row without a stamp may be of another content of the file.
        known = {key for key in rows if key[1] or about["kind"] == "texts"}
        kept = sum((name, stamps[name]) in known for name in stamps)
        todo = [key[0] for key in stamps.items() if key not in log.rows and key not in known]
        resumed = len(stamps) - len(todo) - kept
        with Bar(len(stamps), about["kind"], quiet=quiet, done=kept + resumed) as bar:
            if resumed and not quiet:
                bar.say(f"going on from {log.path}: {resumed} of {len(stamps)} are done")
            skipped = consume(iterate(todo), batch_size, bar, store)
        rows = {key: rows[key] for key in known} | log.rows
        keys = [(name, stamps[name]) for name in names if (name, stamps[name]) in rows]
        if not keys:
            raise DataError(f"none of the {len(names)} {about['kind']} could be embedded")
        if before is None or keys != before.keys:
            values, kept_names = [rows[key] for key in keys], [name for name, _ in keys]
            kept_stamps = [stamp for _, stamp in keys]
            replace = before is not None
            write_embeddings(output, kept_names, values, about, kept_stamps, replace=replace)
        log.remove()
    left = {name for name, _ in keys}
    dropped = 0 if before is None else len({name for name, _ in before.keys} - left)
    return Summary(len(names), len(keys), resumed, skipped, kept, dropped)


def _check_same_inputs(
    log: ResumeLog, stamps: Mapping[str, str], stamp: Callable[[str], str | None]
) -> None:
    """Refuse to go on from a run that had other inputs: its rows would be lost."""
    names = {name for name, _ in log.rows}
    if names.isdisjoint(stamps) and any(stamp(name) is not None for name in names):
        raise DataError(
            f"{log.path}: holds {len(names)} {log.about['kind']} of an unfinished run with other "
            f"inputs; run that one again, {REMEDY}"
        )


def _read_before(output: Path, about: dict[str, str]) -> Stored:
    before = read_embeddings(output)
    if any(before.about.get(key) != value for key, value in about.items() if key != "model"):
        raise DataError(
            f"{output}: is of other weights, settings or version ({before.about.get('kind')} and "
            f"model {before.about.get('model') or 'without a name'}); choose another --output"
        )
    return before
