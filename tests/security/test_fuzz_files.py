"""Fuzzing: mutated files are read, or refused with one of the package's errors.

    FUZZ_SEED=7 FUZZ_SECONDS=600 python -m pytest tests/security/test_fuzz_files.py

runs other mutations, for longer.
"""

import json
import os
import random
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import mlx.core as mx
import numpy as np
import synthetic

from mlx_fastvlm.loader import DEMO_DIRECTORY as FASTVLM_DEMO
from mlx_fastvlm.loader import read_canonical as read_fastvlm
from mlx_fastvlm.loader import read_tokenizer
from mlx_fastvlm.models.fastvlm import FastVLM
from mlx_fastvlm.preprocess.processor import Processor
from mlx_mobileclip import ModelError
from mlx_mobileclip.caching.disk_cache import DiskCache
from mlx_mobileclip.checkpoints.hub import DEMO_DIRECTORY as MOBILECLIP_DEMO
from mlx_mobileclip.checkpoints.hub import Checkpoint
from mlx_mobileclip.checkpoints.weights import check_fit
from mlx_mobileclip.embedding.resume_log import ResumeLog
from mlx_mobileclip.loader import read_canonical as read_mobileclip
from mlx_mobileclip.loader import read_tokenizer as read_own_tokenizer
from mlx_mobileclip.models.clip import MobileCLIP

SEED = int(os.environ.get("FUZZ_SEED", "1"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "6"))
SLOWEST = 5.0  # seconds that one file may take
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "image_size": 256},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8},
        "custom_text": True,
    },
    "preprocess_cfg": {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},
}
APPLE = {
    "embed_dim": 512,
    "image_cfg": {"image_size": 256, "model_name": "mci0"},
    "text_cfg": {"dim": 512, "n_heads_per_layer": [8] * 4, "model_name": "mct"},
}
TIMM = {
    "architecture": "fastvit_mci0",
    "num_classes": 0,
    "model_args": {"img_size": 256},
    "pretrained_cfg": {"input_size": [3, 256, 256], "crop_pct": 0.95, "mean": [0.0] * 3},
}
ABOUT = {"kind": "images", "model": "m", "fingerprint": "f"}


def load_fastvlm(directory: Path) -> None:
    checkpoint = Checkpoint(directory, "fuzzed")
    config, tensors = read_fastvlm(checkpoint)
    processor = Processor(read_tokenizer(checkpoint, config), config)
    check_fit(FastVLM(config), tensors, "fuzzed")
    processor("What is this? 1234 \u00e9\u4e2d")


def load_mobileclip(directory: Path) -> None:
    checkpoint = Checkpoint(directory, "fuzzed")
    config, tensors = read_mobileclip(checkpoint)
    tokenizer = read_own_tokenizer(checkpoint, config)
    check_fit(MobileCLIP(config), tensors, "fuzzed")
    if tokenizer is not None:
        tokenizer(["a photo of a cat &#64;"])


def read_source(directory: Path) -> None:
    """The source's weights do not match, so that only its config is tested."""
    read_mobileclip(Checkpoint(directory, "fuzzed"))


def resume(directory: Path) -> None:
    with ResumeLog(directory / "x.npz", ABOUT) as log:
        log.append([("new", "1")], np.zeros((1, 4), np.float32))


def read_cache(directory: Path) -> None:
    found = DiskCache(directory).read("0" * 64, 2, 4)
    assert found is None or (found.shape == (2, 4) and np.isfinite(found).all())


Case = tuple[Path, list[str], Callable[[Path], None]]


def sources(base: Path) -> dict[str, Case]:
    """Map names to a sound directory, its files to mutate, and the function that reads it."""
    cases: dict[str, Case] = {}
    for layout in ("llava_qwen2", "fast_vlm", "mlx-vlm"):
        path = synthetic.write_layout(base / layout, layout)
        (path / "preprocessor_config.json").write_text(json.dumps(synthetic.IMAGE_PROCESSOR))
        files = ["config.json", "tokenizer.json", "preprocessor_config.json"]
        if layout == "fast_vlm":
            (path / "preprocessor_config.json").rename(path / "processor_config.json")
            (path / "processor_config.json").write_text(
                json.dumps({"image_processor": synthetic.IMAGE_PROCESSOR})
            )
            files[2] = "processor_config.json"
        cases[layout] = path, files, load_fastvlm
    path = synthetic.write_layout(base / "split", "llava_qwen2", shards=2)
    (path / "tokenizer.json").unlink()
    synthetic.write_tokenizer(path, split=True)
    files = ["vocab.json", "merges.txt", "added_tokens.json", "model.safetensors.index.json"]
    cases["split"] = path, files, load_fastvlm
    cases["fastvlm"] = FASTVLM_DEMO, ["config.json", "tokenizer.json"], load_fastvlm
    cases["mobileclip"] = MOBILECLIP_DEMO, ["config.json", "merges.txt"], load_mobileclip
    for name, config in (("open_clip", OPEN_CLIP), ("apple", APPLE), ("timm", TIMM)):
        path = base / name / "MobileCLIP-S0"
        path.mkdir(parents=True)
        mx.save_safetensors(str(path / "w.safetensors"), {"visual.trunk.stem.w": mx.ones((1,))})
        file = "open_clip_config.json" if name == "open_clip" else "config.json"
        (path / file).write_text(json.dumps(config))
        cases[name] = path, [file], read_source
    (base / "log").mkdir()
    log = ResumeLog(base / "log" / "x.npz", ABOUT)
    with log:
        log.append([(f"{i}.png", f"{i} 1") for i in range(3)], np.ones((3, 4), np.float32))
    cases["resume log"] = base / "log", ["x.npz.partial"], resume
    DiskCache(base / "cache").write("0" * 64, np.ones((2, 4), np.float32))
    cases["cache"] = base / "cache", [next((base / "cache").iterdir()).name], read_cache
    return cases


def mutated_log(data: bytes, rng: random.Random) -> bytes:
    """Mutate the keys of a resume log, with valid checksums."""
    magic, keys_bytes, rows_bytes, _ = struct.unpack_from("<4sIII", data)
    keys, rest = data[16 : 16 + keys_bytes], data[16 + keys_bytes :]
    keys, rows = fuzz.mutated(keys, rng), rest[:rows_bytes]
    if rest[rows_bytes:] and rng.random() < 0.7:
        return data[: len(data) - len(rest) + rows_bytes] + mutated_log(rest[rows_bytes:], rng)
    head = struct.pack("<4sIII", magic, len(keys), len(rows), zlib.crc32(rows, zlib.crc32(keys)))
    return head + keys + rest


def find_fault(case: Case, directory: Path, rng: random.Random) -> str | None:
    """Mutate a file of the case and read it; returns a description of the fault, or None."""
    sound, files, read = case
    shutil.copytree(sound, directory, copy_function=os.link)
    name = rng.choice(files)
    data = (sound / name).read_bytes()
    by_record = name.endswith(".partial") and rng.random() < 0.8
    data = (mutated_log if by_record else fuzz.mutated)(data, rng)
    (directory / name).unlink()
    (directory / name).write_bytes(data)
    started, problem = time.perf_counter(), ""
    try:
        read(directory)
    except ModelError as error:
        if not str(error).isprintable() or len(str(error)) > 5000:
            problem = f"an unprintable message: {error!r}"
    except Exception as error:  # noqa: BLE001 (any other exception is a fault)
        problem = f"{type(error).__name__}: {error}"
    shutil.rmtree(directory)
    seconds = time.perf_counter() - started
    if seconds > SLOWEST:
        problem = f"{seconds:.1f} s"
    return f"{name}: {problem}; {data[:3000]!r}" if problem else None


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    cases = sources(tmp_path)
    rng, count = random.Random(SEED), 0
    end = time.perf_counter() + SECONDS
    problems: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.perf_counter() < end:
            for name, case in cases.items():
                found = find_fault(case, tmp_path / "fuzzed", rng)
                if found is not None:
                    problems.setdefault(f"{name}: {found.partition(';')[0][:150]}", found)
                count += 1
    assert not problems, "\n".join(problems.values())
    print(f"{count} files")
    assert count > 20 * len(cases)
