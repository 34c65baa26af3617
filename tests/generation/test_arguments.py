"""Arguments of the Python API work as meant, or are refused with an error that names them."""

import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import ConfigError, FastVLM, ImageError, Processor, PromptError, generate, load
from mlx_mobileclip import DataError, classify
from mlx_mobileclip import load as load_mobileclip

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
QUESTION = "What colour is the square?"
ANSWER = "The square is purple."
PIXELS = np.asarray(Image.open(SCENE).convert("RGB"))
DATA = SCENE.read_bytes()


class ArrayOfAnotherLibrary:
    def __array__(self, *_: Any, **__: Any) -> Any:
        return PIXELS


@pytest.fixture(scope="module")
def demo() -> tuple[FastVLM, Processor]:
    return load("demo")


@pytest.fixture(scope="module")
def clip() -> Any:
    return load_mobileclip("demo")


SOURCES: dict[str, Any] = {
    "bytes": DATA,
    "bytearray": bytearray(DATA),
    "memoryview": memoryview(DATA),
    "file object": io.BytesIO(DATA),
    "NumPy": PIXELS,
    "MLX": mx.array(PIXELS),
    "another library": ArrayOfAnotherLibrary(),
    "PIL": Image.fromarray(PIXELS),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_image_is_accepted(demo: Any, clip: Any, kind: str) -> None:
    source = SOURCES[kind]
    assert generate(*demo, QUESTION, source).text == ANSWER
    expected, found = clip[1].images([SCENE, source])
    assert mx.array_equal(expected, found).item()


def test_batch_of_pixels_equals_paths(clip: Any) -> None:
    batch = np.stack([PIXELS, PIXELS])
    labels = ["a square", "a circle"]
    by_path = classify(*clip, [SCENE, SCENE], labels, cache=False)
    for images in (batch, mx.array(batch)):
        assert classify(*clip, images, labels, cache=False) == by_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (mx.array(PIXELS) / 255, "must be uint8"),
        (mx.array(PIXELS).astype(mx.bfloat16), "cannot be converted to NumPy"),
        (np.zeros((2, 3, 3, 3), np.uint8), "must be uint8 of shape"),
        (io.StringIO("x"), "opened in binary mode"),
        (3, "an image cannot be a int"),
    ],
)
def test_unusable_images_are_refused(demo: Any, clip: Any, source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        generate(*demo, QUESTION, source)
    with pytest.raises(ImageError, match=message):
        clip[1].pixels(source)


def test_closed_images_are_refused(demo: Any, clip: Any) -> None:
    after_loading, before, drawn = Image.open(SCENE), Image.open(SCENE), Image.new("RGB", (9, 9))
    after_loading.load()
    file = io.BytesIO(DATA)
    for source in (after_loading, before, drawn, file):
        source.close()
        for use in (lambda s: generate(*demo, QUESTION, s), clip[1].pixels):
            with pytest.raises(ImageError, match="closed"):
                use(source)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": np.int64(99)},
        {"max_tokens": None},
        {"seed": np.uint32(7), "temperature": np.float32(1e-3)},
        {"temperature": 1, "top_k": np.int16(1)},
        {"top_p": np.float64(1), "min_p": np.float16(0), "repetition_penalty": np.float32(1)},
        {"resolution": np.int64(384)},
        {"kv_bits": np.int8(8)},
        {"stop": None},
        {"stop": ("zzz",)},
        {"system": None},
    ],
)
def test_valid_option_types(demo: Any, options: dict[str, Any]) -> None:
    assert generate(*demo, QUESTION, SCENE, **options).text == ANSWER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3.0}, "max_tokens is 3.0"),
        ({"max_tokens": "3"}, "max_tokens is '3'"),
        ({"seed": 1.5}, "seed is 1.5; it must be an integer"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"top_k": np.float32(3)}, "top_k is "),
        ({"stop": 3}, "stop must be a string or a list of strings, not a int"),
        ({"stop": [None]}, "every stop text must be a non-empty string"),
        ({"system": 3}, "system must be a text, not a int"),
    ],
)
def test_wrong_option_types_are_refused(demo: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        generate(*demo, QUESTION, SCENE, **options)


def test_float_kv_bits_and_resolution_are_refused(demo: Any) -> None:
    with pytest.raises(ConfigError, match=r"kv_bits is 8.0"):
        generate(*demo, QUESTION, SCENE, kv_bits=8.0)
    with pytest.raises(ImageError, match=r"resolution 256.0"):
        generate(*demo, QUESTION, SCENE, resolution=256.0)


@pytest.mark.parametrize("dtype", [mx.int8, mx.float64, "int8", np.float32, 3])
def test_unsupported_dtypes_are_refused(dtype: Any) -> None:
    for read in (load, load_mobileclip):
        with pytest.raises(ConfigError, match="is not one of float16, bfloat16, float32") as caught:
            read("demo", dtype=dtype)
        assert ("use quantize=" in str(caught.value)) == ("int8" in str(dtype))


def test_classify_checks_top_k_and_batch_size(clip: Any) -> None:
    labels = ["a square", "a circle"]
    found = classify(*clip, [SCENE], labels, top_k=np.int64(1), batch_size=np.int64(4), cache=False)
    assert len(found[0]) == 1
    for options in ({"batch_size": 0}, {"batch_size": "2"}, {"top_k": 0}, {"top_k": "1"}):
        with pytest.raises(DataError):
            classify(*clip, [SCENE], labels, cache=False, **options)  # type: ignore[arg-type]
