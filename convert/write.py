"""Write the files of a checkpoint directory, completely or not at all."""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_mobileclip.checkpoints.safetensors import STORED_DTYPES
from mlx_mobileclip.checkpoints.weights import FLOATS, is_finite, not_finite
from mlx_mobileclip.errors import CheckpointError, ModelError
from mlx_mobileclip.json_fields import read_bounded
from mlx_mobileclip.terminal import printable

MAX_SHARD_BYTES = 5 << 30
PARTIAL = ".partial"  # suffix of directories that are not complete yet
CHUNK = 1 << 24  # values checked at a time while writing
MAX_LICENCE_BYTES = 4 << 20
MAX_LICENCES = 16
LICENCE_NAME = re.compile(r"LICEN[CS]E[\w-]*(\.(md|txt|rst|pdf))?", re.IGNORECASE)
NOTICE = """This directory holds model weights converted by mlx-fastvlm from: {source}
{change}

The weights remain under the licence of their source. Apple's FastVLM and MobileCLIP weights are
licensed for research purposes only (Apple Machine Learning Research Model License); a converted
or quantised copy is a derivative of them: keep this notice and the licence file with it.
"""


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Create a directory that appears only if the block ends without an error.

    The block writes to a directory that is moved to the target at the end. Until then it is in a
    temporary directory beside the target, which only the user can read, and which is removed
    afterwards. Each run has a separate one. Those of killed runs are removed.

    Args:
        target: Directory to create; it must not exist yet, or be empty.

    Yields:
        The directory to write to.

    Raises:
        CheckpointError: the target is in use, also by another run that ended first, or cannot be
            written.
    """
    check_target(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        with ExitStack() as stack:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _lock(target.parent):  # no other run may remove this one as abandoned
                _remove_abandoned(target)
                partial.mkdir(mode=0o700)
                stack.enter_context(_lock(partial))
            directory = partial / target.name
            directory.mkdir()
            yield directory
            directory.rename(target)  # may replace an empty directory only
    except (OSError, RuntimeError) as error:
        check_target(target)  # another run may have ended first
        raise CheckpointError(
            f"{target}: cannot be written ({error}); free some space or choose another --mlx-path"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _lock(directory: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a directory and yield whether that worked; some network file systems refuse."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove temporary directories of the user's ended processes, whose locks are free."""
    partial_name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}{re.escape(PARTIAL)}")
    for path in target.parent.iterdir():
        if not partial_name.fullmatch(path.name):
            continue
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            with _lock(path, wait=False) as abandoned:
                if abandoned:
                    shutil.rmtree(path, ignore_errors=True)


def check_target(target: Path) -> None:
    """Check that the target can be written, and that nothing would be overwritten.

    Raises:
        CheckpointError: the target exists and is not an empty directory, is a link or a mount
            point, or its parent cannot be written.
    """
    try:
        in_use = target.exists() and (not target.is_dir() or any(target.iterdir()))
        fixed = "a link" if target.is_symlink() else "a mount point" if _is_mount(target) else ""
        _check_writable(target)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{target}: cannot be written ({reason})") from error
    if target.name in ("", ".."):
        raise CheckpointError(f"{target}: give a new directory as --mlx-path")
    if in_use:
        raise CheckpointError(f"{target}: already exists; remove it or choose another --mlx-path")
    if fixed:
        raise CheckpointError(
            f"{target}: cannot be written, as it is {fixed}; give a new directory as --mlx-path, "
            "such as one in it"
        )


def _is_mount(target: Path) -> bool:
    """Whether a directory is a mount point, including bind mounts of the same file system."""
    if target.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return False
    name = str(target.resolve()).replace(" ", "\\040")
    return any(line.split()[4] == name for line in lines)


def _check_writable(target: Path) -> None:
    """Raise OSError if the target's nearest existing parent cannot be written."""
    parent = target.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{parent} cannot be written")


def write_json(path: Path, values: dict[str, object]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def copy_licence(source: Path, target: Path, name: str, change: str) -> list[str]:
    """Copy the source's licence files and write NOTICE.

    A link is followed only as `check_link` allows, so that the source cannot publish a user's file.

    Args:
        source: Directory or file of the checkpoint. Files beside a single file are not copied.
        target: Directory to write to.
        name: Name of the source, for the notice.
        change: Description of the changes to the weights, for the notice.

    Returns:
        The names of licence files that were not copied: links to elsewhere, not files, larger than
        4 MB, or beyond the first 16.
    """
    paths = sorted(source.iterdir()) if source.is_dir() else []
    licences = [path for path in paths if LICENCE_NAME.fullmatch(path.name)]
    left_out = [path.name for path in licences[MAX_LICENCES:]]
    for path in licences[:MAX_LICENCES]:
        try:
            data = read_bounded(path, MAX_LICENCE_BYTES)
        except (ModelError, OSError):
            left_out.append(path.name)
        else:
            (target / path.name).write_bytes(data)
    notice = NOTICE.format(source=printable(name), change=printable(change, keep="\n"))
    (target / "NOTICE").write_text(notice, encoding="utf-8")
    return left_out


def write_tensors(
    directory: Path, tensors: dict[str, mx.array], shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write model.safetensors, or numbered shards and their index.

    Lazy tensors are evaluated, written and released one by one, so that peak memory is that of the
    largest one.

    Args:
        directory: Directory to write to.
        tensors: By name; emptied while writing.
        shard_bytes: Limit of the tensors in one file, unless a single tensor is larger.

    Raises:
        CheckpointError: a value is not finite.
    """
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    groups = _shards(tensors, shard_bytes)
    weight_map = {}
    for i, names in enumerate(groups):
        last = f"-{i + 1:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        file = f"model{last}.safetensors"
        with (directory / file).open("xb") as shard:
            shard.write(_header({name: tensors[name] for name in names}))
            for name in names:
                shard.write(_data(tensors.pop(name), name))
        weight_map.update(dict.fromkeys(names, file))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2))


def _shards(tensors: dict[str, mx.array], limit_bytes: int) -> list[list[str]]:
    """Split the sorted names into groups of at most `limit_bytes`, or one larger tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if groups[-1] and size + tensors[name].nbytes > limit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensors[name].nbytes
    return groups


def _header(tensors: dict[str, mx.array]) -> bytes:
    """Header of a safetensors file: length and JSON, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": STORED_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data(tensor: mx.array, name: str) -> memoryview:
    """Evaluate a tensor, check that its values are finite, and return its bytes."""
    mx.eval(tensor)
    if tensor.dtype in FLOATS:
        flat = tensor.reshape(-1)
        chunks = (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))
        if not all(is_finite(chunk).item() for chunk in chunks):
            raise not_finite([name], tensor.dtype, "the weights")
    if tensor.dtype == mx.bfloat16:  # NumPy has no bfloat16
        tensor = tensor.view(mx.uint16)
    data: NDArray[Any] = np.ascontiguousarray(np.asarray(tensor)).reshape(-1)
    return data.view(np.uint8).data
