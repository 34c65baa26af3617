"""Read an embeddings file, to update it."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from ..errors import DataError
from .resume_log import Key


@dataclass(frozen=True, slots=True)
class Stored:
    """Contents of an embeddings file.

    Attributes:
        metadata: Such as `kind` and `fingerprint`.
        keys: Name and stamp of each row; the stamp is empty in files of earlier versions.
        rows: Embeddings, float32 (N, E).
    """

    metadata: dict[str, str]
    keys: list[Key]
    rows: NDArray[np.float32]


def read_embeddings(path: Path) -> Stored:
    """Read a .safetensors, .npz or .parquet file written by `write_embeddings`.

    Raises:
        DataError: the file cannot be read or is not an embeddings file.
    """
    read = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(path.suffix, _read_parquet)
    try:
        metadata, names, stamps, rows = read(path)
        stamps = stamps or [""] * len(names)
        keys = [(name, stamp) for name, stamp in zip(names, stamps, strict=True)]
        valid = all(isinstance(text, str) for key in keys for text in key)
        valid = valid and rows.dtype == np.float32 and rows.ndim == 2 and len(rows) == len(keys)
        if not valid or not np.isfinite(rows).all():
            raise ValueError("names and embeddings do not agree")
    except Exception as error:  # readers raise many types of errors on foreign files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as embeddings ({reason}); choose another --output"
        ) from error
    return Stored(metadata, keys, rows)


Contents = tuple[dict[str, str], list[Any], list[Any], NDArray[Any]]


def _read_safetensors(path: Path) -> Contents:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        rows = file.get_tensor("embeddings")
    names, stamps = json.loads(metadata.pop("names")), json.loads(metadata.pop("stamps", "[]"))
    return metadata, names, stamps, rows


def _read_npz(path: Path) -> Contents:
    with zipfile.ZipFile(path) as archive:  # np.savez does not compress, so entries cannot expand
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
    with np.load(path, allow_pickle=False) as file:
        metadata = {key: str(file[key]) for key in file.files if file[key].ndim == 0}
        stamps = json.loads(file["stamps"].tobytes()) if "stamps" in file.files else []
        return metadata, json.loads(file["names"].tobytes()), stamps, file["embeddings"]


def _read_parquet(path: Path) -> Contents:
    from pyarrow import parquet

    table = parquet.read_table(path)
    stamps = table["stamp"].to_pylist() if "stamp" in table.column_names else []
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    column = table["embedding"].combine_chunks()
    rows = column.flatten().to_numpy().reshape(len(column), -1)
    return metadata, table["name"].to_pylist(), stamps, rows
