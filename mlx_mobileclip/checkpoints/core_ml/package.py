"""Read the files of a Core ML package, and the blobs in its weight.bin.

Source of the layout of weight.bin: coremltools 9.0 `mlmodel/src/MILBlob/Blob/StorageFormat.hpp`.
"""

import os
import stat
import struct
from bisect import bisect, insort
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ...json_fields import hub_blobs, read_json

SUFFIX = ".mlpackage"
MANIFEST = "Manifest.json"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
PARTS = (MANIFEST, MODEL, WEIGHTS)
MAX_MODEL_BYTES = 16 << 20  # FastViTHD's has 0.8 MB, without its weights
BLOB_VERSION = 2
HEADER = struct.Struct("<II")  # blobs, version
RECORD = struct.Struct("<IIQQQ")  # mark, type, bytes, offset of the data, padding bits
RECORD_BYTES = 64
RECORD_MARK = 0xDEADBEEF


@dataclass(frozen=True, slots=True)
class Blob:
    """One array of weight.bin, as stored.

    Attributes:
        kind: Code of its data type.
        data: Its bytes, memory-mapped.
    """

    kind: int
    data: NDArray[np.uint8]


class Package:
    """A package that has all its files.

    Attributes:
        path: The .mlpackage directory.
        where: Its name in messages.
    """

    def __init__(self, path: Path, where: str):
        """Check that the files exist.

        Raises:
            CheckpointError: a file is missing, or is a link to outside the package.
        """
        self.path, self.where = path, where
        if not path.is_dir():
            raise CheckpointError(
                f"{where}: is not a directory, as a Core ML package must be; download it again"
            )
        for part in PARTS:
            self._check(part)
        self._weights: NDArray[np.uint8] | None = None
        self._extents: list[tuple[int, int]] = []  # start and end of each blob read, sorted

    def model(self) -> bytes:
        """The contents of model.mlmodel."""
        manifest = read_json(self.path / MANIFEST, follow_links=True)  # see `_check`
        entries, root = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
        entry = entries.get(root) if isinstance(entries, dict) and isinstance(root, str) else None
        stated = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(stated, str) or f"Data/{stated}" != MODEL:
            raise CheckpointError(
                f"{self.where}: {MANIFEST} does not name {MODEL} as its model; download it again"
            )
        path = self.path / MODEL
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise CheckpointError(
                f"{self.where}: model.mlmodel is larger than {MAX_MODEL_BYTES >> 20} MB; weights "
                "are expected in weight.bin"
            )
        return path.read_bytes()

    def blob(self, offset: int) -> Blob:
        """Return the blob whose record is at an offset of weight.bin."""
        if self._weights is None:
            self._weights = self._map()
        size = len(self._weights)
        if offset % RECORD_BYTES or not RECORD_BYTES <= offset <= size - RECORD_BYTES:
            raise self._invalid(f"a blob at {offset} of {size} bytes")
        record = self._weights[offset : offset + RECORD.size]
        mark, kind, length, start, _ = RECORD.unpack(record.tobytes())
        if mark != RECORD_MARK:
            raise self._invalid(f"no blob at {offset}")
        if start != offset + RECORD_BYTES or length > size - start:
            raise self._invalid(f"the blob at {offset} says {length} bytes at {start} of {size}")
        extent = (offset, start + length)
        i = bisect(self._extents, extent)
        before, after = self._extents[max(i - 1, 0) : i], self._extents[i : i + 1]
        if before != [extent]:
            if any(end > offset for _, end in before) or any(at < extent[1] for at, _ in after):
                raise self._invalid(f"the blob at {offset} overlaps another")
            insort(self._extents, extent)
        return Blob(kind, self._weights[start : start + length])

    def _map(self) -> NDArray[np.uint8]:
        path = self.path / WEIGHTS
        if path.stat().st_size < RECORD_BYTES:
            raise self._invalid(f"only {path.stat().st_size} bytes")
        mapped = np.memmap(path, np.uint8, "r")
        _, version = HEADER.unpack(mapped[: HEADER.size].tobytes())
        if version != BLOB_VERSION:
            raise self._invalid(f"version {version} instead of {BLOB_VERSION}")
        return mapped

    def _invalid(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: weight.bin is not valid ({problem}); download it again"
        )

    def _check(self, part: str) -> None:
        path = self.path / part
        try:
            real, root = path.resolve(strict=True), self.path.resolve()
            regular = stat.S_ISREG(real.stat().st_mode)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise CheckpointError(
                f"{self.where}: {part} is missing from the package; download it again"
            ) from error
        if not real.is_relative_to(root) and real.parent != hub_blobs(root.parent):
            raise CheckpointError(
                f"{self.where}: {part} is a link to outside the package, which is not followed; "
                "replace it by a copy of the file"
            )
        if not regular or not os.access(real, os.R_OK):
            raise CheckpointError(f"{self.where}: {part} is not a readable file")
