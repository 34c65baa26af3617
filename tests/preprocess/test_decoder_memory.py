"""Limit on the memory of image decoders, in all threads of a process."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import image_bombs as bombs
import isolated
import pytest
from PIL import Image

from mlx_mobileclip.preprocess.decoder_memory import MAX_DECODER_BYTES, MemoryBudget
from mlx_mobileclip.preprocess.image import open_image, open_resized


def growth_mb(code: str, *arguments: str) -> float:
    """Growth in MB of a new process while it runs the part of the code after "# work"."""
    imports, work = code.split("# work\n")
    script = f"""
import json, sys
{imports}
from bench.worker import reset_peak, peak
reset_peak()
before = peak()
{work}
print(json.dumps((peak() - before) / 1e6))
"""
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, check=False, env=isolated.ENVIRONMENT, timeout=100,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return float(json.loads(process.stdout))


def test_threads_decode_within_the_memory_budget(tmp_path: Path) -> None:
    """Four images of 400 MB each, in four threads: two at a time."""
    for i in range(4):
        (tmp_path / f"{i}.webp").write_bytes(bombs.webp_canvas(5000, 5000, 1))
    code = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from mlx_mobileclip.models.clip import PreprocessConfig
from mlx_mobileclip.preprocess.processor import Processor
# work
processor = Processor(PreprocessConfig(image_size=64, **json.loads(sys.argv[2])))
with ThreadPoolExecutor(4) as pool:
    for pixels in pool.map(processor.pixels, sorted(Path(sys.argv[1]).iterdir())):
        assert pixels.shape == (64, 64, 3)
"""
    options = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
    # glibc keeps up to 100 MB of freed memory.
    assert 700 < growth_mb(code, str(tmp_path), json.dumps(options)) < 1050


def test_calibration_holds_one_image_at_a_time(tmp_path: Path) -> None:
    data = bombs.png(6000, 4000)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(data)
    code = """
from pathlib import Path
from convert.calibration import calibration_samples
# work
samples = calibration_samples(Path(sys.argv[1]))
assert len(samples) == 4
"""
    one = 6000 * 4000 * 5 / 1e6
    assert growth_mb(code, str(tmp_path)) < 2 * one


def test_image_memory_is_reserved_until_it_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    budget = MemoryBudget(MAX_DECODER_BYTES)
    monkeypatch.setattr("mlx_mobileclip.preprocess.image.DECODER_MEMORY", budget)
    data = bombs.encoded(Image.new("RGB", (300, 200)), "PNG")

    def resize(image: Image.Image) -> Image.Image:
        held.append(MAX_DECODER_BYTES - budget.left)
        return image.resize((1, 1))

    assert open_resized(data, resize).size == (1, 1)
    assert held == [300 * 200 * 8]
    assert budget.left == MAX_DECODER_BYTES
    with pytest.raises(ZeroDivisionError):
        open_resized(data, lambda image: image.resize((1 // 0, 1)))
    open_image(data)
    assert budget.left == MAX_DECODER_BYTES


def test_reservation_waits_until_memory_is_free() -> None:
    budget, order = MemoryBudget(10), []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with budget.reserve(6):
            order.append("second")

    thread = threading.Thread(target=second)
    with budget.reserve(5):
        thread.start()
        entered.wait()
        with budget.reserve(4):
            order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]
    assert budget.left == 10
