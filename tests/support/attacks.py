"""Hostile checkpoints: what builds them from a sound one, and what comes of loading them.

A case is a directory whose files are links to those of the sound checkpoint, and a `Build` changes
it in one way.
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
Cases = dict[str, tuple[Build, str]]  # by name: what builds it, and why it is refused


def put(path: Path, data: bytes | str) -> None:
    """Replace a file; those of a case are links to the sound checkpoint's."""
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def safetensors(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def rewritten(change: Callable[[dict[str, Any], bytes], bytes]) -> Build:
    """Write the file anew from its header and data."""

    def build(case: Path) -> None:
        put(case / "model.safetensors", change(*header_of(case / "model.safetensors")))

    return build


def twice_named(header: dict[str, Any], data: bytes, **changes: Any) -> bytes:
    again = json.dumps({VICTIM: header[VICTIM] | changes})[1:-1]
    return safetensors((json.dumps(header)[:-1] + ", " + again + "}").encode(), data)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Build:
    """Change the tensors of the sound checkpoint."""

    def build(case: Path) -> None:
        path = case / "model.safetensors"
        loaded = dict(mx.load(str(path)))
        change(loaded)
        path.unlink()
        mx.save_safetensors(str(path), loaded)

    return build


def config(**changes: Any) -> Build:
    """Change config.json; a None removes the field."""

    def build(case: Path) -> None:
        values = json.loads((case / "config.json").read_text()) | changes
        values = {k: v for k, v in values.items() if v is not None}
        put(case / "config.json", json.dumps(values))

    return build


def packing(bits: Any = 4, group_size: Any = 32, mode: Any = "affine") -> dict[str, Any]:
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


# Running them


def write_sound(base: Path) -> Path:
    """The sound checkpoint, in a directory of its own beside which the cases will lie."""
    return synthetic.write_layout(base / "sound", "llava_qwen2")


def refused(groups: Mapping[str, Cases]) -> list[tuple[str, str]]:
    """The group and name of each case."""
    return [(group, name) for group, cases in groups.items() for name in cases]


def builds(groups: Mapping[str, Cases]) -> dict[str, Build]:
    """What builds each case, by its group and name."""
    return {f"{group} {name}": groups[group][name][0] for group, name in refused(groups)}


def outcomes(
    sound: Path, builds: Mapping[str, Build], *, named: bool = False
) -> dict[str, isolated.Outcome]:
    """Build each case and ask it a question, all in one process; by the same names.

    `named` calls the directory of a case by its name, where that is one of the attacks; all others
    must not depend on theirs.
    """
    directories = []
    for i, (name, build) in enumerate(builds.items()):
        directories.append(sound.parent / (name if named else f"case{i}"))
        shutil.copytree(sound, directories[-1], copy_function=os.link)
        build(directories[-1])
    ask = ["--prompt", "Hello", "--max-tokens", "4", "--dtype", "float32"]
    cases = [("answer", ["--model", str(directory), *ask]) for directory in directories]
    return dict(zip(builds, isolated.run(cases), strict=True))
