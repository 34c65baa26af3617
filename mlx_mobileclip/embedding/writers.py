"""Write embeddings as .safetensors, .npz or .parquet.

The names are one JSON text in .safetensors and .npz, and a column in .parquet:
    with safe_open("x.safetensors", "numpy") as file: names = json.loads(file.metadata()["names"])
    with np.load("x.npz") as file: names = json.loads(file["names"].tobytes())
`stamps`, a column `stamp` in .parquet, holds size and time of each file in the same way.
"""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..errors import DataError

OUTPUT_SUFFIXES = (".safetensors", ".npz", ".parquet")
MAX_NAMES_BYTES = 99_000_000  # safetensors refuses a header of more than 100 MB
FORMAT = "mlx-mobileclip-embeddings-1"


def check_output(output: Path, *, update: bool = False) -> None:
    """Check that the output can be written, before any work is done.

    Args:
        output: The file.
        update: It may exist, for it is brought up to date.

    Raises:
        DataError: unknown suffix, pyarrow is missing, the file exists, or its directory does not.
    """
    if output.suffix not in OUTPUT_SUFFIXES:
        raise DataError(f"{output}: must end in {', '.join(OUTPUT_SUFFIXES)}")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise DataError(f"{output}: .parquet needs pyarrow; run: pip install pyarrow")
    if os.path.exists(output) and not update:  # noqa: PTH110 (never raises)
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
) -> None:
    """Write names and embeddings; the file appears complete or not at all.

    Args:
        output: File to create or to replace: .safetensors (names as JSON in its metadata), .npz
            (as JSON in bytes) or .parquet. A new one has the mode that the umask gives, a
            replaced one the mode that it had.
        names: N names.
        rows: N embeddings (E,).
        about: Metadata to store with them.
        stamps: N stamps, by which an update knows the files that have changed; or none.

    Raises:
        DataError: the file cannot be written.
    """
    embeddings = np.stack(rows)
    about = {"format": FORMAT, "normalized": "true"} | about
    texts = {"names": list(names)} | ({"stamps": list(stamps)} if stamps else {})
    partial = output.with_name(f".{output.name}.tmp")
    try:
        partial.unlink(missing_ok=True)  # left by a run that was killed
        with partial.open("xb") as file:
            # safetensors replaces the file by one that only the owner can read.
            mode = os.fstat(file.fileno()).st_mode if not output.exists() else output.stat().st_mode
            if output.suffix == ".npz":
                # Not an array of strings: each would take as much space as the longest one.
                arrays: dict[str, Any] = {key: np.array(value) for key, value in about.items()}
                for key, value in texts.items():
                    arrays[key] = np.frombuffer(json.dumps(value).encode(), np.uint8)
                np.savez(file, embeddings=embeddings, **arrays)
        if output.suffix == ".safetensors":
            header = about | {key: json.dumps(value) for key, value in texts.items()}
            save_file({"embeddings": embeddings}, partial, header)
        elif output.suffix == ".parquet":
            _write_parquet(partial, embeddings, about, texts)
        partial.chmod(mode & 0o7777)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # before the old output goes
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{output}: cannot be written ({str(error)[:200]}); free some space and run the same "
            "command again, what is done is kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _write_parquet(
    path: Path,
    embeddings: NDArray[np.float32],
    about: dict[str, str],
    texts: dict[str, list[str]],
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
    parquet.write_table(table.replace_schema_metadata(about), path)
