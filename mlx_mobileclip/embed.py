"""Embed any number of images or texts into one file: .safetensors, .npz or .parquet.

Threads decode while the model runs. The output appears complete or not at all; until then the
rows are in a journal beside it (journal.py), from which the next run goes on.

The names are one JSON text in .safetensors and .npz, a column in .parquet:
    with safe_open("x.safetensors", "numpy") as file: names = json.loads(file.metadata()["names"])
    with np.load("x.npz") as file: names = json.loads(file["names"].tobytes())
"""

import glob
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from .clip import MobileCLIP
from .command import Bar, printable
from .errors import DataError, ModelError
from .fingerprint import fingerprint
from .journal import Journal
from .processor import Processor
from .zeroshot import TOKENIZER_PROBE, text_tower

IMAGE_SUFFIXES = frozenset(
    # HEIC cannot be opened, but passing over it in silence would lose half a phone's photos.
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mpo", ".heic", ".heif")
)
OUTPUT_SUFFIXES = (".safetensors", ".npz", ".parquet")
MAX_NAMES_BYTES = 99_000_000  # safetensors refuses a header of more than 100 MB
FORMAT = "mlx-mobileclip-embeddings-1"


@dataclass(slots=True)
class Summary:
    """What came of a run.

    Attributes:
        total: Items asked for.
        embedded: Items in the output.
        resumed: Those of them that an earlier run had done.
        skipped: Items left out, by name, with the reason.
    """

    total: int
    embedded: int = 0
    resumed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def find_images(source: str, on_skip: Callable[[str, str], None] | None = None) -> list[str]:
    """List the images that a directory, a glob, a list file or an image's own path stands for.

    Args:
        source: A directory is searched recursively for image files, hidden ones left out; a glob
            may use `**`; a list file holds one path a line, relative to the current directory.
        on_skip: Called with each subdirectory that cannot be read, and the reason; by default
            such a one is an error.

    Returns:
        Paths: sorted from a directory or a glob, in the file's order from a list.

    Raises:
        DataError: there is no such thing, nothing in it, or it cannot be read.
    """
    path = _expand(source)
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    if path.is_dir():
        files = _walk(path, on_skip)
        found = [_literal(str(file)) for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise DataError(f"{source}: holds no image; looked for {kinds}")
        return found
    if path.is_file():
        is_image = path.suffix.lower() in IMAGE_SUFFIXES
        return [_literal(str(path))] if is_image else _read_list(path)
    if glob.has_magic(source):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (the glob may be absolute)
        found = sorted(_literal(match) for match in matches if Path(match).is_file())
        if not found:
            raise DataError(f"{source}: no file matches; put a glob in quotes")
        return found
    raise DataError(f"{source}: no such file or directory; give a directory, a glob or a list")


def _expand(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: a name such as ~$a.png
        return Path(path)


def _literal(path: str) -> str:
    """Keep a file's own ~ from being taken for a home directory."""
    return f"./{path}" if path.startswith("~") else path


def _openable(path: str) -> str:
    """Path drops the ./ that `_literal` has put before a ~, and would expand it after all."""
    return str(Path.cwd() / path) if path.startswith("./~") else path


def _walk(directory: Path, on_skip: Callable[[str, str], None] | None) -> Iterator[Path]:
    def failed(error: OSError) -> None:
        folder, reason = str(error.filename), f"cannot be read ({error.strerror or error})"
        if on_skip is None or folder == str(directory):
            raise DataError(f"{folder}: {reason}") from error
        on_skip(folder, reason)

    for folder, folders, files in os.walk(directory, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _read_list(path: Path) -> list[str]:
    names = [name for name in read_lines(path) if name.strip()]
    if not names or any("\0" in name for name in names):
        raise DataError(f"{path}: is no list of images; write one path a line")
    return names


def read_lines(path: Path) -> list[str]:
    """The lines of a file, whatever their encoding: bytes that are not UTF-8 become surrogates.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        text = _expand(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def check_output(output: Path) -> None:
    """Raise DataError if the output cannot be written; before any work is done."""
    if output.suffix not in OUTPUT_SUFFIXES:
        raise DataError(f"{output}: must end in {', '.join(OUTPUT_SUFFIXES)}")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise DataError(f"{output}: .parquet needs pyarrow; run: pip install pyarrow")
    if output.exists():
        raise DataError(f"{output}: already exists; remove it or choose another --output")
    if not output.absolute().parent.is_dir():
        raise DataError(f"{output}: there is no directory {output.parent}; create it first")


def check_names(output: Path, names: Sequence[str]) -> None:
    """Raise DataError if the output has no room for the names; before any work is done."""
    # The header is JSON too: it escapes the marks of the names' own JSON once more.
    if output.suffix == ".safetensors" and len(json.dumps(json.dumps(names))) > MAX_NAMES_BYTES:
        raise DataError(f"{output}: the names do not fit a safetensors header; write .npz instead")


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
    """Embed image files into one file; broken ones are reported on stderr and left out.

    Args:
        model: Model with an image tower.
        processor: The model's processor.
        paths: Image files.
        output: File to create; its suffix names the format. It holds `embeddings`, float32
            (N, E) with unit rows, and `names`, the paths, in the order of `paths`; how to read
            them is at the top of this file.
        name: The model's name, stored in the output.
        batch_size: Images that go through the model at once.
        workers: Threads that decode; by default as many as there are cores, at most 8.
        quiet: Report broken files only.

    Returns:
        What was embedded and what was skipped.

    Raises:
        DataError: the output cannot be written, or not a single image could be read.
    """

    def prepare(path: str) -> NDArray[Any]:
        return processor.pixels(_openable(path))

    config = model.config
    same = fingerprint(model.image, config.image, config.preprocess)
    return _embed(
        {path: _stamp(path) for path in paths},
        list(paths),
        prepare,
        lambda batch: model.encode_image(batch, normalize=True),
        Path(output),
        {"kind": "images", "model": name, "fingerprint": same},
        batch_size=batch_size,
        workers=workers,
        quiet=quiet,
    )


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
    """Embed texts into one file, in the same way as `embed_images`; `names` holds the texts."""

    def prepare(text: str) -> NDArray[Any]:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError("is not UTF-8")
        return np.asarray(processor.texts([text]))[0]

    same = fingerprint(text_tower(model)[0], model.config.text)
    probe = json.dumps(np.asarray(processor.texts([TOKENIZER_PROBE])).tolist())
    return _embed(
        dict.fromkeys(texts, ""),
        list(texts),
        prepare,
        lambda batch: model.encode_text(batch, normalize=True),
        Path(output),
        {
            "kind": "texts",
            "model": name,
            "fingerprint": same,
            "tokenizer": hashlib.sha256(probe.encode()).hexdigest(),
        },
        batch_size=batch_size,
        workers=1,
        quiet=quiet,
    )


def _stamp(path: str) -> str:
    """Changes when the file does, so that a resumed run does not keep an old image's row."""
    try:
        status = Path(_openable(path)).expanduser().stat()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: ~ of an unknown user
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _embed(
    stamps: dict[str, str],
    names: list[str],
    prepare: Callable[[str], NDArray[Any]],
    encode: Callable[[mx.array], mx.array],
    output: Path,
    about: dict[str, str],
    *,
    batch_size: int,
    workers: int | None,
    quiet: bool,
) -> Summary:
    if batch_size < 1:
        raise DataError(f"a batch size of {batch_size} is not possible; it must be at least 1")
    check_output(output)
    check_names(output, names)
    summary = Summary(len(names))
    with Journal(output, about) as journal:
        todo = [name for name, stamp in stamps.items() if (name, stamp) not in journal.rows]
        done = len(stamps) - len(todo)
        with Bar(len(stamps), about["kind"], quiet=quiet, done=done) as bar:
            if done and not quiet:
                bar.say(f"going on from {journal.path}: {done} of {len(stamps)} are done")
            try:
                prepared = _ahead(todo, prepare, workers or min(8, os.cpu_count() or 1), batch_size)
                with closing(prepared):
                    while batch := list(islice(prepared, batch_size)):
                        good = {n: item for n, item in batch if not isinstance(item, Exception)}
                        bad = {n: str(item) for n, item in batch if isinstance(item, Exception)}
                        if good:
                            rows = encode(mx.array(np.stack(list(good.values()))))
                            bad |= _keep(journal, stamps, list(good), rows)
                        for name, reason in bad.items():
                            summary.skipped[name] = reason
                            bar.say(printable(f"skipped {_told(name, reason)}"))
                        bar.advance(len(batch))
            except KeyboardInterrupt:
                bar.say(f"{bar.done} of {bar.total} {bar.unit} are done")
                raise
        kept = [name for name in names if (name, stamps[name]) in journal.rows]
        if not kept:
            journal.remove()
            raise DataError(f"none of the {len(names)} {about['kind']} could be embedded")
        write_embeddings(output, kept, [journal.rows[name, stamps[name]] for name in kept], about)
        journal.remove()
    summary.embedded, summary.resumed = len(kept), done
    return summary


def _told(name: str, reason: str) -> str:
    return reason if name in reason else f"{name[:200]}: {reason}"


def _keep(
    journal: Journal, stamps: dict[str, str], names: list[str], embeddings: mx.array
) -> dict[str, str]:
    """Store the rows that are finite; returns the names of the others, with the reason."""
    rows = np.asarray(embeddings.astype(mx.float32))
    finite = np.isfinite(rows).all(axis=1)
    keys = [(name, stamps[name]) for name, ok in zip(names, finite, strict=True) if ok]
    if keys:
        journal.append(keys, rows[finite])
    reason = "its embedding is not finite; try --dtype float32"
    return {name: reason for name, ok in zip(names, finite, strict=True) if not ok}


def _ahead(
    names: Sequence[str], prepare: Callable[[str], NDArray[Any]], workers: int, batch_size: int
) -> Generator[tuple[str, NDArray[Any] | Exception], None, None]:
    """Prepare items in threads, two batches ahead of the reader; in order, errors included."""
    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[str, Future[NDArray[Any]]]] = deque()
    try:
        for name in names:
            pending.append((name, pool.submit(prepare, name)))
            if len(pending) > 2 * batch_size:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(name: str, future: Future[NDArray[Any]]) -> tuple[str, NDArray[Any] | Exception]:
    error = future.exception()
    if error is None:
        return name, future.result()
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, ModelError):
        return name, error
    return name, DataError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def write_embeddings(
    output: Path,
    names: Sequence[str],
    rows: Sequence[NDArray[np.float32]],
    about: dict[str, str],
) -> None:
    """Write names and embeddings; the file appears complete or not at all.

    Args:
        output: File to create: .safetensors (names as JSON in its metadata), .npz (as JSON in
            bytes) or .parquet.
        names: N names.
        rows: N embeddings (E,).
        about: Text to store with them.

    Raises:
        DataError: the file cannot be written.
    """
    embeddings = np.stack(rows)
    about = {"format": FORMAT, "normalized": "true"} | about
    partial = output.with_name(f".{output.name}.tmp")
    try:
        if output.suffix == ".safetensors":
            save_file({"embeddings": embeddings}, partial, about | {"names": json.dumps(names)})
        elif output.suffix == ".npz":
            # Not an array of texts: each would take the room of the longest.
            as_bytes = np.frombuffer(json.dumps(names).encode(), np.uint8)
            with partial.open("wb") as file:
                np.savez(file, embeddings=embeddings, names=as_bytes, **_texts(about))
        else:
            _write_parquet(partial, names, embeddings, about)
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{output}: cannot be written ({str(error)[:200]}); free some space and run the same "
            "command again, what is done is kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _texts(about: dict[str, str]) -> dict[str, Any]:
    return {key: np.array(value) for key, value in about.items()}


def _write_parquet(
    path: Path, names: Sequence[str], embeddings: NDArray[np.float32], about: dict[str, str]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # Arrow's strings are strict UTF-8.
    readable = [name.encode("utf-8", "backslashreplace").decode("utf-8") for name in names]
    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    table = pa.table({"name": pa.array(readable, pa.string()), "embedding": values})
    parquet.write_table(table.replace_schema_metadata(about), path)
