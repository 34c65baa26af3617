"""Write embeddings as .safetensors, .npz or .parquet.

The names are one JSON text in .safetensors and .npz, and a column in .parquet:
    with safe_open("x.safetensors", "numpy") as file: names = json.loads(file.metadata()["names"])
    with np.load("x.npz") as file: names = json.loads(file["names"].tobytes())
`stamps` (column `stamp` in .parquet), size and mtime of each file, are stored in the same way.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

OUTPUT_SUFFIXES = (".safetensors", ".npz", ".parquet")
MAX_NAMES_BYTES = 99_000_000  # safetensors refuses a header of more than 100 MB
FORMAT = "mlx-mobileclip-embeddings-1"
TEMPORARY_SUFFIX = ".tmp"
RESUME = "free some space and run the same command again: finished rows are kept"
Texts = dict[str, list[str]]


def check_output(output: Path, *, update: bool = False) -> None:
    """Check that the output can be written, before any work is done.

    Args:
        output: File to write.
        update: The file may exist and is updated.

    Raises:
        DataError: the suffix is unknown, pyarrow is missing, the file exists (with `update`: is
            not a regular file), or its directory does not exist.
    """
    if output.suffix not in OUTPUT_SUFFIXES:
        raise DataError(f"{output}: must end in {', '.join(OUTPUT_SUFFIXES)}")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise DataError(f"{output}: .parquet needs pyarrow; run: pip install pyarrow")
    if update and os.path.lexists(output) and not os.path.isfile(output):  # noqa: PTH113
        raise DataError(f"{output}: is not a file; remove it, or choose another --output")
    if os.path.lexists(output) and not update:  # also a broken link
        raise DataError(
            f"{output}: already exists; update it with --update, remove it, or choose another "
            "--output"
        )
    if not os.path.isdir(output.absolute().parent):  # noqa: PTH112 (never raises)
        raise DataError(f"{output}: there is no directory {output.parent}; create it first")


def check_names(output: Path, names: Sequence[str], stamps: Sequence[str] = ()) -> None:
    """Check that the output format can store the names, before any work is done.

    Raises:
        DataError: the names exceed the limit of a safetensors header.
    """
    # The header is JSON too, so the JSON of the names is escaped once more.
    texts = (names, stamps) if stamps else (names,)
    size = sum(len(json.dumps(json.dumps(text))) for text in texts)
    if output.suffix == ".safetensors" and size > MAX_NAMES_BYTES:
        raise DataError(f"{output}: the names do not fit a safetensors header; write .npz instead")


def write_embeddings(
    output: Path,
    names: Sequence[str],
    rows: Sequence[NDArray[np.float32]],
    metadata: dict[str, str],
    stamps: Sequence[str] = (),
    *,
    replace: bool = False,
) -> None:
    """Write names and embeddings atomically.

    Args:
        output: File to create: .safetensors (names as JSON in its metadata), .npz (as JSON in
            bytes) or .parquet. A new file gets its mode from the umask, a replaced one keeps
            its mode. Only one run may write it at a time.
        names: N names.
        rows: N embeddings (E,).
        metadata: Metadata to store with them.
        stamps: N stamps (size and mtime of each file), or none.
        replace: Replace an existing file.

    Raises:
        DataError: the file cannot be written, or exists and `replace` is False.
    """
    embeddings = np.stack(rows)
    metadata = {"format": FORMAT, "normalized": "true"} | metadata
    texts = {"names": list(names)} | ({"stamps": list(stamps)} if stamps else {})
    write = {".safetensors": _write_safetensors, ".npz": _write_npz}.get(
        output.suffix, _write_parquet
    )
    with new_file(output, replace=replace) as file:
        write(file, embeddings, metadata, texts)


@contextmanager
def new_file(output: Path, *, replace: bool = False, remedy: str = RESUME) -> Iterator[BinaryIO]:
    """Write a file under another name that is moved to `output` when it is complete.

    Args:
        output: The file.
        replace: Replace an existing file.
        remedy: What to do if it cannot be written, for the error.

    Raises:
        DataError: the file cannot be written, or exists and `replace` is False.
    """
    # The name cannot be guessed, and mode "x" does not follow links.
    temporary = output.with_name(f".{output.name}.{os.urandom(8).hex()}{TEMPORARY_SUFFIX}")
    try:
        _remove_temporary_files(output)
        with temporary.open("xb") as file:
            if replace and output.exists():
                os.fchmod(file.fileno(), output.stat().st_mode & 0o7777)
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the old output is replaced
        if replace:
            temporary.replace(output)
        else:
            _publish(temporary, output)
    except FileExistsError as error:
        raise DataError(
            f"{output}: was created meanwhile and is not overwritten; move it and run the same "
            "command again: finished rows are kept"
        ) from error
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({str(error)[:200]}); {remedy}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, output: Path) -> None:
    """Move a complete file to its final name without replacing what is there, unlike a rename."""
    try:
        os.link(temporary, output)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links, such as exFAT
        if os.path.lexists(output):
            raise FileExistsError(output) from error
        temporary.rename(output)


def _remove_temporary_files(output: Path) -> None:
    """Remove temporary files of this output that killed runs have left."""
    name = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{16}}{re.escape(TEMPORARY_SUFFIX)}")
    for path in output.absolute().parent.iterdir():
        if name.fullmatch(path.name):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                path.unlink(missing_ok=True)


def _write_safetensors(
    file: BinaryIO, embeddings: NDArray[np.float32], metadata: dict[str, str], texts: Texts
) -> None:
    metadata = metadata | {key: json.dumps(value) for key, value in texts.items()}
    entry = {"dtype": "F32", "shape": embeddings.shape, "data_offsets": (0, embeddings.nbytes)}
    header = json.dumps({"__metadata__": metadata, "embeddings": entry}).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    file.write(np.ascontiguousarray(embeddings, "<f4").data)


def _write_npz(
    file: BinaryIO, embeddings: NDArray[np.float32], metadata: dict[str, str], texts: Texts
) -> None:
    # Not an array of strings, where each would take as much space as the longest one.
    arrays: dict[str, Any] = {key: np.array(value) for key, value in metadata.items()}
    for key, value in texts.items():
        arrays[key] = np.frombuffer(json.dumps(value).encode(), np.uint8)
    np.savez(file, embeddings=embeddings, **arrays)


def _write_parquet(
    file: BinaryIO, embeddings: NDArray[np.float32], metadata: dict[str, str], texts: Texts
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # Arrow's strings are strict UTF-8.
    valid_names = [
        name.encode("utf-8", "backslashreplace").decode("utf-8") for name in texts["names"]
    ]
    columns = {"name": pa.array(valid_names, pa.string())}
    if "stamps" in texts:
        # An altered name does not identify the file, so an update never reuses its row.
        pairs = zip(texts["names"], valid_names, texts["stamps"], strict=True)
        stamps = [stamp if name == valid else "altered name" for name, valid, stamp in pairs]
        columns["stamp"] = pa.array(stamps, pa.string())
    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    table = pa.table({**columns, "embedding": values})
    parquet.write_table(table.replace_schema_metadata(metadata), file)
