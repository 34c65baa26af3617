"""Write a canonical checkpoint directory, completely or not at all."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_mobileclip.checkpoint import write_tensors
from mlx_mobileclip.errors import CheckpointError

LICENCE_NAME = re.compile(r"LICEN[CS]E[\w-]*(\.(md|txt|rst|pdf))?", re.IGNORECASE)
NOTICE = """This directory holds model weights converted by mlx-fastvlm from: {source}
{change}

The weights remain under the licence of their source. Apple's FastVLM and MobileCLIP weights are
licensed for research purposes only (Apple Machine Learning Research Model License); a converted
or quantised copy is a derivative of them: keep this notice and the licence file with it.
"""


def write_checkpoint(
    target: Path,
    config: dict[str, object],
    tensors: dict[str, mx.array],
    write_other_files: Callable[[Path], None],
) -> None:
    """Write config.json, the tensors and what the callback adds; all of it, or nothing.

    Everything goes to a directory beside the target, which takes its name only when complete. A
    directory left by a killed conversion is replaced by the next one.

    Args:
        target: Directory to create; it must not exist yet, or be empty.
        config: Contents of config.json.
        tensors: Tensors by name; emptied on the way.
        write_other_files: Called with the unfinished directory.

    Raises:
        CheckpointError: the target is in use, or the disk is full.
    """
    check_target(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(partial, tensors)
        write_json(partial / "config.json", config)
        write_other_files(partial)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error}); free some space or choose another --mlx-path"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raise CheckpointError if writing to the target would destroy something."""
    try:
        in_use = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{target}: cannot be written ({reason})") from error
    if target.name in ("", ".."):
        raise CheckpointError(f"{target}: give a new directory as --mlx-path")
    if in_use:
        raise CheckpointError(f"{target}: already exists; remove it or choose another --mlx-path")


def write_json(path: Path, values: dict[str, object]) -> None:
    """Write one object, for people to read too."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def file_states(source: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file of a checkpoint, to see later whether one changed."""
    paths = source.iterdir() if source.is_dir() else [source]
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def copy_licence(source: Path, target: Path, name: str, change: str) -> None:
    """Copy the source's licence files and write a notice.

    A link is followed only within the source, or from a snapshot of the Hub's cache to the files
    of its repository: a planted one would publish whatever file of the user's it points to.
    """
    home = source.parent.parent if source.parent.name == "snapshots" else source
    # What lies beside a single file may belong to another.
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        inside = path.resolve().is_relative_to(home.resolve())
        if LICENCE_NAME.fullmatch(path.name) and path.is_file() and inside:
            shutil.copyfile(path, target / path.name)
    (target / "NOTICE").write_text(NOTICE.format(source=name, change=change))
