"""Export an index as Parquet."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..embedding.writers import check_output, new_file
from ..errors import DataError
from .store import Store, absolute
from .vectors import Vectors

ROWS_AT_ONCE = 8192
COLUMNS = ("size", "mtime_ns", "taken", "camera", "latitude", "longitude", "width", "height")
TYPES = ("int64", "int64", "string", "string", "float64", "float64", "int32", "int32")


def export(store: Store, vectors: Vectors, output: Path) -> int:
    """Write one row per photo: path, hash, metadata and embedding.

    Args:
        store: The index.
        vectors: The embeddings.
        output: New .parquet file.

    Returns:
        The number of rows. Non-UTF-8 bytes of a path are written as backslash escapes.
    """
    if output.suffix != ".parquet":
        raise DataError(f"{output}: must end in .parquet")
    check_output(output)
    import pyarrow as pa
    from pyarrow import parquet

    embedding = pa.list_(pa.float16(), vectors.dim)
    fields = [("path", pa.string()), ("hash", pa.binary())]
    fields += [(name, getattr(pa, kind)()) for name, kind in zip(COLUMNS, TYPES, strict=True)]
    schema = pa.schema([*fields, ("embedding", embedding)])
    schema = schema.with_metadata({"model": store.meta("model") or "", "normalized": "true"})
    roots, count, last = store.roots(), 0, 0
    sql = f"SELECT id, slot, root, path, hash, {', '.join(COLUMNS)} FROM file "
    sql += "WHERE slot IS NOT NULL AND id > ? ORDER BY id LIMIT ?"
    with new_file(output) as file, parquet.ParquetWriter(file, schema) as writer:
        while rows := store.rows(sql, last, ROWS_AT_ONCE):
            last, count = rows[-1][0], count + len(rows)
            values = vectors.rows([row[1] for row in rows]).astype(np.float16)
            columns: list[Any] = [[_text(absolute(roots[row[2]], bytes(row[3]))) for row in rows]]
            columns += list(zip(*[row[4:] for row in rows], strict=True))
            flat = pa.array(values.ravel(), pa.float16())
            arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=False)]
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, vectors.dim))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return count


def _text(path: bytes) -> str:
    return os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
