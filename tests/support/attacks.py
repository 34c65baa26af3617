"""Build hostile checkpoints from a sound one, and load them.

A case is a directory of hard links to the files of the sound checkpoint; its `Build` makes one
change to it.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import isolated
import mlx.core as mx
import synthetic

VICTIM = "model.norm.weight"  # (64,), float32
Build = Callable[[Path], None]
Cases = dict[str, tuple[Build, str]]  # name to build function and reason in the error


def put(path: Path, data: bytes | str) -> None:
    """Replace a file of a case without writing through its hard link."""
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def safetensors(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def rewrite_safetensors(change: Callable[[dict[str, Any], bytes], bytes]) -> Build:
    """Rewrite model.safetensors from its header and data."""

    def build(case: Path) -> None:
        put(case / "model.safetensors", change(*header_of(case / "model.safetensors")))

    return build


def with_duplicate(header: dict[str, Any], data: bytes, **changes: Any) -> bytes:
    again = json.dumps({VICTIM: header[VICTIM] | changes})[1:-1]
    return safetensors((json.dumps(header)[:-1] + ", " + again + "}").encode(), data)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Build:
    """Change the tensors of a case."""

    def build(case: Path) -> None:
        path = case / "model.safetensors"
        loaded = dict(mx.load(str(path)))
        change(loaded)
        path.unlink()
        mx.save_safetensors(str(path), loaded)

    return build


def config(**changes: Any) -> Build:
    """Change fields of config.json; None removes a field."""

    def build(case: Path) -> None:
        values = json.loads((case / "config.json").read_text()) | changes
        values = {k: v for k, v in values.items() if v is not None}
        put(case / "config.json", json.dumps(values))

    return build


def quantization_block(bits: Any = 4, group_size: Any = 32, mode: Any = "affine") -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "mode": mode}


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Build:
    def build(case: Path) -> None:
        data = json.loads((case / "tokenizer.json").read_text())
        put(case / "tokenizer.json", json.dumps(change(data) or data))

    return build


def split_tables(merges: str | bytes | None, added: str = "added_tokens.json") -> Build:
    def build(case: Path) -> None:
        (case / "tokenizer.json").unlink()
        synthetic.write_tokenizer(case, split=True)
        (case / "added_tokens.json").rename(case / added)
        (case / "merges.txt").unlink()
        if merges is None:
            os.mkfifo(case / "merges.txt")
        else:
            put(case / "merges.txt", merges)

    return build


# Running the cases


def write_sound(base: Path) -> Path:
    """Write the sound checkpoint; the cases are built beside it."""
    return synthetic.write_layout(base / "sound", "llava_qwen2")


def refused(groups: Mapping[str, Cases]) -> list[tuple[str, str]]:
    """The group and name of each case."""
    return [(group, name) for group, cases in groups.items() for name in cases]


def builds(groups: Mapping[str, Cases]) -> dict[str, Build]:
    """Build functions by group and name."""
    return {f"{group} {name}": groups[group][name][0] for group, name in refused(groups)}


def outcomes(
    sound: Path, builds: Mapping[str, Build], *, named: bool = False
) -> dict[str, isolated.Outcome]:
    """Build the cases, ask each a question in one subprocess, and return the outcomes by name.

    `named` calls the directory of a case by its name, for attacks through the directory name.
    """
    directories = []
    for i, (name, build) in enumerate(builds.items()):
        directories.append(sound.parent / (name if named else f"case{i}"))
        shutil.copytree(sound, directories[-1], copy_function=os.link)
        build(directories[-1])
    ask = ["--prompt", "Hello", "--max-tokens", "4", "--dtype", "float32"]
    cases = [("answer", ["--model", str(directory), *ask]) for directory in directories]
    return dict(zip(builds, isolated.run(cases), strict=True))
