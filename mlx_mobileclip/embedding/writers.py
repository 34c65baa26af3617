"""Write embeddings as .safetensors, .npz or .parquet.

The names are one JSON text in .safetensors and .npz, and a column in .parquet:
    with safe_open("x.safetensors", "numpy") as file: names = json.loads(file.metadata()["names"])
    with np.load("x.npz") as file: names = json.loads(file["names"].tobytes())
"""

import json
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


def check_output(output: Path) -> None:
    """Check that the output can be written, before any work is done.

    Raises:
        DataError: unknown suffix, pyarrow is missing, the file exists, or its directory does not.
    """
    if output.suffix not in OUTPUT_SUFFIXES:
        raise DataError(f"{output}: must end in {', '.join(OUTPUT_SUFFIXES)}")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise DataError(f"{output}: .parquet needs pyarrow; run: pip install pyarrow")
    if output.exists():
        raise DataError(f"{output}: already exists; remove it or choose another --output")
    if not output.absolute().parent.is_dir():
        raise DataError(f"{output}: there is no directory {output.parent}; create it first")


def check_names(output: Path, names: Sequence[str]) -> None:
    """Check that the names fit the output format, before any work is done.

    Raises:
        DataError: the names exceed the limit of a safetensors header.
    """
    # The header is JSON as well, so the quotes in the JSON of the names are escaped once more.
    if output.suffix == ".safetensors" and len(json.dumps(json.dumps(names))) > MAX_NAMES_BYTES:
        raise DataError(f"{output}: the names do not fit a safetensors header; write .npz instead")


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
        about: Metadata to store with them.

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
            # Not an array of strings: each would take as much space as the longest one.
            as_bytes = np.frombuffer(json.dumps(names).encode(), np.uint8)
            metadata: dict[str, Any] = {key: np.array(value) for key, value in about.items()}
            with partial.open("wb") as file:
                np.savez(file, embeddings=embeddings, names=as_bytes, **metadata)
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
