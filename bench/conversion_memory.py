"""Measure the peak memory of converting and loading, as counted by the operating system.

    python bench/conversion_memory.py --size 7b --dir /some/large/disk

Writes a sharded bfloat16 checkpoint of random weights in Apple's layout and the real shapes (7B:
15.5 GB), converts it to 4 bits and loads the result, each in its own process. Prints the peak
resident memory of each and the size of the weights as JSON, and removes the files.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

import synthetic  # noqa: E402

SHARD_BYTES = 4 << 30
# float16, like the stored weights.
LOAD = "import sys; from mlx_fastvlm import load; load(sys.argv[1], dtype='float16')"


def write_source(directory: Path, size: str) -> int:
    """Write a checkpoint shard by shard; returns the size of its weights in bytes."""
    directory.mkdir()
    shapes = synthetic.read_keys(f"apple_llava_qwen2_{size}")
    (directory / "config.json").write_text(json.dumps(synthetic.apple_config(size, 1024)))
    synthetic.write_tokenizer(directory)
    shard: dict[str, mx.array] = {}
    weight_map: dict[str, str] = {}
    held = total = 0
    names = list(shapes)
    noise = (0.02 * mx.random.normal((1 << 22,))).astype(mx.bfloat16)  # repeated, for speed
    for i, name in enumerate(names):
        count = math.prod(shapes[name])
        value = mx.tile(noise, -(-count // noise.size))[:count].reshape(shapes[name])
        shard[name] = value if len(shapes[name]) > 1 else mx.ones_like(value)
        mx.eval(shard[name])
        held += shard[name].nbytes
        if held > SHARD_BYTES or i + 1 == len(names):
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            mx.save_safetensors(str(directory / file), shard)
            weight_map |= dict.fromkeys(shard, file)
            total, held = total + held, 0
            shard.clear()
            print(f"wrote {total / 1e9:.1f} GB", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak_of(*arguments: str) -> dict[str, float]:
    """Run Python in a new process; returns its seconds and peak resident bytes."""
    started = time.monotonic()
    process = os.posix_spawn(
        sys.executable, [sys.executable, *arguments], {**os.environ, "PYTHONPATH": str(ROOT)}
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"failed: python {' '.join(arguments)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.monotonic() - started, "peak_bytes": usage.ru_maxrss * unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("0.5b", "1.5b", "7b"), default="7b")
    parser.add_argument(
        "--dir", type=Path, help="directory with enough free space (default: a temporary one)"
    )
    parser.add_argument("options", nargs="*", help="options of convert, after --, instead of -q")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=args.dir))
    try:
        source, target = directory / "source", directory / "target"
        # In a new process, because on Linux children inherit the peak of their parent.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            source_bytes = pool.submit(write_source, source, args.size).result()
        convert = ["-m", "convert", "--model", str(source), "--mlx-path", str(target)]
        converting = peak_of(*convert, *(args.options or ["-q"]))
        stored = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        loading = peak_of("-c", LOAD, str(target))
        idle = peak_of("-c", "import mlx_fastvlm.loader, mlx_fastvlm.models.fastvlm")
        record = {
            "size": args.size,
            "machine": f"{platform.system()} {platform.machine()}",
            "mlx": mx.__version__,
            "source_bytes": source_bytes,
            "stored_bytes": stored,
            "convert": converting,
            "load": loading,
            "import": idle,
        }
        print(json.dumps(record, indent=1))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
