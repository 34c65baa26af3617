"""Read safetensors files as hostile input.

MLX's reader accepts tensors that overlap or whose shapes are negative or overflow, so every header
is first checked by the reference implementation (`safetensors.safe_open`).
"""

import os
import re
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, name_some, refuse_lfs_pointer
from ..json_fields import check_link, read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = f"{SINGLE_NAME}.index.json"
MAX_INDEX_BYTES = 16 << 20
MAX_DIMENSIONS = 4
MAX_HEADER_BYTES = 4 << 20  # ten times that of the largest checkpoint
SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
# Weights are floats or quantised; uint8 are mxfp scales, int64 BatchNorm's step counters.
STORED_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int64: "I64",
    mx.uint8: "U8",
}


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index lists, or all in the directory.

    Raises:
        CheckpointError: there are none, one is a link to outside, or the index lists a file that
            is missing or outside, or does not list a model.safetensors beside it.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if os.path.lexists(index):
        names = read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index}: has no weight_map; download the file again")
        for name in names.values():
            if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
                shown = repr(name[:80]) if isinstance(name, str) else type(name).__name__
                raise CheckpointError(f"{index}: {shown} is not the name of a shard beside it")
        files = sorted(set(names.values()))
        for name in files:
            if not (directory / name).is_file():
                raise CheckpointError(
                    f"{directory / name}: the index lists this shard, but it is missing; "
                    "download it again"
                )
        if single.name not in files and os.path.lexists(single):
            raise CheckpointError(
                f"{directory}: has {single.name} beside an index of other files; remove whichever "
                f"is out of date, {single.name} or {index.name} with its shards"
            )
        return _checked(directory, files)
    # Hidden files are not weights: unpacking an archive on macOS can leave "._model.safetensors".
    names = sorted(
        p.name
        for p in directory.iterdir()
        if SHARD_NAME.fullmatch(p.name) and p.name[0] != "." and p.is_file()
    )
    if not names:
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if others:
            raise CheckpointError(
                f"{directory}: has its weights only as {name_some(others, 2)}, which is not "
                "supported here; save them as safetensors, for example with save_pretrained()"
            )
        raise CheckpointError(
            f"{directory}: has no .safetensors file; give the directory of a checkpoint"
        )
    return _checked(directory, names)


def _checked(directory: Path, names: list[str]) -> list[Path]:
    paths = [directory / name for name in names]
    for path in paths:
        check_link(path)
    return paths


def _check_header(path: Path) -> None:
    """Reject headers that MLX's reader does not check."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
        refuse_lfs_pointer(start, path)
        header_bytes = int.from_bytes(start[:8], "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: a header of {header_bytes} bytes; download it again")
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(name)
                shape, dtype = tensor.get_shape(), tensor.get_dtype()
                if len(shape) > MAX_DIMENSIONS or any(n < 1 for n in shape):
                    raise CheckpointError(f"{path}: {name[:200]} has the shape {shape[:8]}")
                if dtype not in STORED_DTYPES.values():
                    known = ", ".join(sorted(STORED_DTYPES.values()))
                    raise CheckpointError(f"{path}: {name[:200]} is {dtype}, not one of {known}")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file ({str(error)[:200]}); download it again"
        ) from error


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """All tensors of one file by name, lazily: data is read when first used.

    Raises:
        CheckpointError: the file is damaged, or MLX cannot open it.
    """
    _check_header(path)
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise CheckpointError(f"{path}: its name is not UTF-8, which MLX needs; rename it")
    try:
        loaded = mx.load(str(path), format="safetensors", stream=mx.cpu)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: MLX cannot read it ({str(error)[:200]}); download it again"
        ) from error
    assert isinstance(loaded, dict)
    return loaded


def read_tensors(directory: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint by name, lazily: data is read when first used.

    Raises:
        CheckpointError: a file is damaged, or two files hold the same tensor.
    """
    tensors: dict[str, mx.array] = {}
    for path in tensor_files(directory):
        loaded = read_safetensors(path)
        duplicates = sorted(tensors.keys() & loaded.keys())
        if duplicates:
            raise CheckpointError(f"{path}: repeats {name_some(duplicates)} of another shard")
        tensors.update(loaded)
    return tensors
