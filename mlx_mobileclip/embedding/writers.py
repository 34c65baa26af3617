"""Write embeddings as .safetensors, .npz or .parquet.

The names are one JSON text in .safetensors and .npz, and a column in .parquet:
    with safe_open("x.safetensors", "numpy") as file: names = json.loads(file.metadata()["names"])
    with np.load("x.npz") as file: names = json.loads(file["names"].tobytes())
`stamps`, a column `stamp` in .parquet, holds size and time of each file in the same way.
"""

import json
import os
import re
import stat
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

OUTPUT_SUFFIXES = (".safetensors", ".npz", ".parquet")
MAX_NAMES_BYTES = 99_000_000  # safetensors refuses a header of more than 100 MB
FORMAT = "mlx-mobileclip-embeddings-1"
PARTIAL = ".tmp"
Texts = dict[str, list[str]]


def check_output(output: Path, *, update: bool = False) -> None:
    """Check that the output can be written, before any work is done.

    Args:
        output: The file.
        update: It may exist, for it is brought up to date.

    Raises:
        DataError: unknown suffix, pyarrow is missing, the file exists (or is to be brought up to
            date and is no file), or its directory does not.
    """
    if output.suffix not in OUTPUT_SUFFIXES:
        raise DataError(f"{output}: must end in {', '.join(OUTPUT_SUFFIXES)}")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise DataError(f"{output}: .parquet needs pyarrow; run: pip install pyarrow")
    if update and os.path.lexists(output) and not os.path.isfile(output):  # noqa: PTH113
        raise DataError(f"{output}: is no file; remove it, or choose another --output")
    if os.path.lexists(output) and not update:  # a link to nothing as well
        raise DataError(
            f"{output}: already exists; bring it up to date with --update, remove it, or choose "
            "another --output"
        )
    if not os.path.isdir(output.absolute().parent):  # noqa: PTH112 (never raises)
        raise DataError(f"{output}: there is no directory {output.parent}; create it first")


def check_names(output: Path, names: Sequence[str], stamps: Sequence[str] = ()) -> None:
    """Check that the names fit the output format, before any work is done.

    Raises:
        DataError: the names exceed the limit of a safetensors header.
    """
    # The header is JSON as well, so the quotes in the JSON of the names are escaped once more.
    texts = (names, stamps) if stamps else (names,)
    size = sum(len(json.dumps(json.dumps(text))) for text in texts)
    if output.suffix == ".safetensors" and size > MAX_NAMES_BYTES:
        raise DataError(f"{output}: the names do not fit a safetensors header; write .npz instead")


def write_embeddings(
    output: Path,
    names: Sequence[str],
    rows: Sequence[NDArray[np.float32]],
    about: dict[str, str],
    stamps: Sequence[str] = (),
    *,
    replace: bool = False,
) -> None:
    """Write names and embeddings; the file appears complete or not at all.

    Args:
        output: File to create: .safetensors (names as JSON in its metadata), .npz (as JSON in
            bytes) or .parquet. A new one has the mode that the umask gives, a replaced one the
            mode that it had. Only one run may write it at a time.
        names: N names.
        rows: N embeddings (E,).
        about: Metadata to store with them.
        stamps: N stamps, by which an update knows the files that have changed; or none.
        replace: The file may exist, and is replaced.

    Raises:
        DataError: the file cannot be written, or exists although it is not to be replaced.
    """
    embeddings = np.stack(rows)
    about = {"format": FORMAT, "normalized": "true"} | about
    texts = {"names": list(names)} | ({"stamps": list(stamps)} if stamps else {})
    write = {".safetensors": _write_safetensors, ".npz": _write_npz}.get(
        output.suffix, _write_parquet
    )
    # Nobody can guess the name, and "x" follows no link.
    partial = output.with_name(f".{output.name}.{os.urandom(8).hex()}{PARTIAL}")
    try:
        _remove_abandoned(output)
        with partial.open("xb") as file:
            if replace and output.exists():
                os.fchmod(file.fileno(), output.stat().st_mode & 0o7777)
            write(file, embeddings, about, texts)
            file.flush()
            os.fsync(file.fileno())  # before the old output goes
        if replace:
            partial.replace(output)
        else:
            _publish(partial, output)
    except FileExistsError as error:
        raise DataError(
            f"{output}: has appeared meanwhile, and is kept; move it, and run the same command "
            "again: what is done is kept"
        ) from error
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written ({str(error)[:200]}); free some space and run the same "
            "command again, what is done is kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _publish(partial: Path, output: Path) -> None:
    """Give a complete file its name, unless something has that name: a rename would replace it."""
    try:
        os.link(partial, output)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links, such as exFAT
        if os.path.lexists(output):
            raise FileExistsError(output) from error
        partial.rename(output)


def _remove_abandoned(output: Path) -> None:
    """Remove what runs that were killed left while they wrote this output."""
    name = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{16}}{re.escape(PARTIAL)}")
    for path in output.absolute().parent.iterdir():
        if name.fullmatch(path.name):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                path.unlink(missing_ok=True)


def _write_safetensors(
    file: BinaryIO, embeddings: NDArray[np.float32], about: dict[str, str], texts: Texts
) -> None:
    metadata = about | {key: json.dumps(value) for key, value in texts.items()}
    entry = {"dtype": "F32", "shape": embeddings.shape, "data_offsets": (0, embeddings.nbytes)}
    header = json.dumps({"__metadata__": metadata, "embeddings": entry}).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    file.write(np.ascontiguousarray(embeddings, "<f4").data)


def _write_npz(
    file: BinaryIO, embeddings: NDArray[np.float32], about: dict[str, str], texts: Texts
) -> None:
    # Not an array of strings: each would take as much space as the longest one.
    arrays: dict[str, Any] = {key: np.array(value) for key, value in about.items()}
    for key, value in texts.items():
        arrays[key] = np.frombuffer(json.dumps(value).encode(), np.uint8)
    np.savez(file, embeddings=embeddings, **arrays)


def _write_parquet(
    file: BinaryIO, embeddings: NDArray[np.float32], about: dict[str, str], texts: Texts
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # Arrow's strings are strict UTF-8.
    readable = [name.encode("utf-8", "backslashreplace").decode("utf-8") for name in texts["names"]]
    columns = {"name": pa.array(readable, pa.string())}
    if "stamps" in texts:
        # A name that had to be altered is another file's, so its row is never taken over.
        pairs = zip(texts["names"], readable, texts["stamps"], strict=True)
        stamps = [stamp if name == shown else "altered name" for name, shown, stamp in pairs]
        columns["stamp"] = pa.array(stamps, pa.string())
    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    table = pa.table({**columns, "embedding": values})
    parquet.write_table(table.replace_schema_metadata(about), file)
