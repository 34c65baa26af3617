"""Time of each stage of FastVLM-0.5B: `python -m pytest bench`.

The weights are random, which costs the same as trained ones. `--benchmark-json FILE` keeps a
record with the machine and versions. On Linux preload a real BLAS, as for the parity tests.
"""

import io
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import FastVLM
from mlx_fastvlm.config import FastVLMConfig, Qwen2Config
from mlx_mobileclip.device import default_dtype
from mlx_mobileclip.fastvit import PRESETS
from mlx_mobileclip.image import open_image, resize_crop, resize_pad, to_array

TEXT = Qwen2Config(896, 24, 14, 2, 4864, 151936, 1e-6, 1e6, 32768, True)
CONFIG = FastVLMConfig(TEXT, PRESETS["fastvithd"], "mlp2x_gelu", 1024, "pad", 8192)
PROMPT = 300  # tokens: one image at 1024 px and a question


@pytest.fixture(scope="module")
def model() -> FastVLM:
    model = FastVLM(CONFIG)
    model.set_dtype(default_dtype())
    mx.eval(model.parameters())
    return model


def timed(benchmark: Any, rounds: int, compute: Any) -> None:
    """Run once to warm up, then `rounds` times to the end of the computation."""
    benchmark.extra_info.update(mlx=mx.__version__, device=str(mx.default_device()))
    benchmark.pedantic(lambda: mx.eval(compute()), warmup_rounds=1, rounds=rounds)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("shape", [(4032, 3024), (3024, 4032)], ids=["wide", "tall"])
def test_preprocess_12_megapixels(benchmark: Any, shape: tuple[int, int], mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(shape, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    resize = {"pad": resize_pad, "crop": resize_crop}[mode]
    benchmark(lambda: to_array(resize(open_image(file.getvalue()), 1024)))


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_image_tower_and_projector(benchmark: Any, model: FastVLM, resolution: int) -> None:
    pixels = mx.random.uniform(shape=(1, resolution, resolution, 3))
    timed(benchmark, 3, lambda: model.encode_image(pixels))


def test_prefill(benchmark: Any, model: FastVLM) -> None:
    embeddings = model.embed(mx.arange(PROMPT)[None])

    def compute() -> mx.array:
        cache = model.make_cache(PROMPT + 1)
        return model(mx.arange(PROMPT)[None], cache, embeddings, last_only=True)

    timed(benchmark, 3, compute)


def test_decode_one_token(benchmark: Any, model: FastVLM) -> None:
    cache = model.make_cache(2 * PROMPT)
    mx.eval(model(mx.arange(PROMPT)[None], cache, last_only=True))
    timed(benchmark, 10, lambda: model(mx.array([[1]]), cache))
