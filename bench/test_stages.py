"""Time each stage, from a file to an answer: `python -m pytest bench`.

Weights are random, which take the same time as trained ones. `--benchmark-json FILE` writes a
record with machine and versions, `-k STAGE` selects. On Linux preload a fast BLAS, as for the
parity tests.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from bench import inputs, models
from mlx_fastvlm import FastVLM, Processor, load, stream_generate
from mlx_mobileclip import MobileCLIP
from mlx_mobileclip.device import default_dtype
from mlx_mobileclip.models.variants import VARIANTS
from mlx_mobileclip.preprocess.image import open_image, resize_crop, resize_pad, to_array

PROMPT = models.IMAGE_TOKENS + models.QUESTION_TOKENS
ANSWER_TOKENS = 16


def prepare(model: nn.Module) -> Any:
    model.set_dtype(default_dtype())
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def model() -> FastVLM:
    return prepare(models.ours("0.5b"))


@pytest.fixture(scope="module")
def quantized_model() -> FastVLM:
    model = models.ours("0.5b")
    nn.quantize(model.language_model, 64, 4)
    return prepare(model)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(load("demo")[1].tokenizer, models.config("0.5b"))


def timed(benchmark: Any, compute: Callable[[], Any], rounds: int = 3) -> None:
    """Time `rounds` runs with their results evaluated, after one warm-up run."""
    benchmark.extra_info.update(mlx=version("mlx"), device=str(mx.default_device()))
    benchmark.pedantic(lambda: mx.eval(compute()), warmup_rounds=1, rounds=rounds)


# Loading and preprocessing.


def test_load_demo(benchmark: Any) -> None:
    benchmark(lambda: load("demo"))


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_preprocess_12_megapixels(benchmark: Any, turned: bool, mode: str) -> None:
    file = inputs.jpeg(turned=turned)
    resize = {"pad": resize_pad, "crop": resize_crop}[mode]
    benchmark(lambda: to_array(resize(open_image(file), models.RESOLUTION)))


@pytest.mark.parametrize("length", [100, 10_000])
def test_question_to_ids(benchmark: Any, processor: Processor, length: int) -> None:
    benchmark(lambda: processor("how many? " * (length // 10)))


# FastVLM-0.5B.


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_image_tower_and_projector(benchmark: Any, model: FastVLM, resolution: int) -> None:
    pixels = mx.array(inputs.pixels(0, (1, resolution, resolution, 3)))
    timed(benchmark, lambda: model.encode_image(pixels))


@pytest.mark.parametrize("length", [PROMPT, 4 * PROMPT])
def test_prefill(benchmark: Any, model: FastVLM, length: int) -> None:
    ids = mx.arange(length)[None]
    embeddings = model.embed(ids)
    mx.eval(embeddings)

    def compute() -> mx.array:
        return model(ids, model.make_cache(length + 1), embeddings, last_only=True)

    timed(benchmark, compute)


@pytest.mark.parametrize("weights", ["model", "quantized_model"])
def test_decode_one_token(benchmark: Any, request: pytest.FixtureRequest, weights: str) -> None:
    model: FastVLM = request.getfixturevalue(weights)
    cache = model.make_cache(2 * PROMPT)
    mx.eval(model(mx.arange(PROMPT)[None], cache, last_only=True))
    timed(benchmark, lambda: model(mx.array([[1]]), cache), rounds=10)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "p"])
def test_answer_without_image(
    benchmark: Any, model: FastVLM, processor: Processor, sampling: dict[str, Any]
) -> None:
    def compute() -> None:
        for _ in stream_generate(
            model, processor, "Who?", max_tokens=ANSWER_TOKENS, seed=0, **sampling
        ):
            pass

    timed(benchmark, compute)


@pytest.mark.parametrize("same_image", [False, True], ids=["new", "same"])
def test_first_token_about_an_image(
    benchmark: Any, model: FastVLM, processor: Processor, same_image: bool
) -> None:
    seeds = iter(range(100))

    def compute() -> None:
        photo = inputs.photo(0 if same_image else next(seeds), models.RESOLUTION)
        next(stream_generate(model, processor, "What is this?", photo, max_tokens=1))

    timed(benchmark, compute)


# MobileCLIP.


@pytest.fixture(scope="module", params=["MobileCLIP2-S0", "MobileCLIP-S2", "MobileCLIP-B"])
def clip(request: pytest.FixtureRequest) -> MobileCLIP:
    return prepare(MobileCLIP(VARIANTS[request.param]))


@pytest.mark.parametrize("batch", [1, 32])
def test_images(benchmark: Any, clip: MobileCLIP, batch: int) -> None:
    side = clip.config.preprocess.image_size
    pixels = mx.array(inputs.pixels(0, (batch, side, side, 3)))
    timed(benchmark, lambda: clip.encode_image(pixels))


@pytest.mark.parametrize("batch", [1, 32])
def test_texts(benchmark: Any, clip: MobileCLIP, batch: int) -> None:
    assert clip.config.text
    ids = mx.ones((batch, clip.config.text.context_length), mx.int32)
    timed(benchmark, lambda: clip.encode_text(ids))
