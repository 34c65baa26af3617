"""Wrong arguments to MobileCLIP and its processor end in a one-line error."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mobileclip import ImageError, MobileCLIP, Processor, PromptError, load

SCENE = np.full((40, 30, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def demo() -> tuple[MobileCLIP, Processor]:
    return load("demo")


def test_numpy_arrays_are_accepted(demo: tuple[MobileCLIP, Processor]) -> None:
    model, processor = demo
    pixels, ids = processor.images([SCENE]), processor.texts(["a circle"])
    for dtype in (np.float32, np.float64):
        found = model.encode_image(np.asarray(pixels).astype(dtype))  # type: ignore[arg-type]
        assert mx.array_equal(found, model.encode_image(pixels)).item()
    for dtype in (np.int32, np.int64):
        texts = model.encode_text(np.asarray(ids).astype(dtype))  # type: ignore[arg-type]
        assert mx.array_equal(texts, model.encode_text(ids)).item()


INTEGERS = mx.zeros((1, 8, 8, 3), mx.int32)


@pytest.mark.parametrize(
    "pixels", [SCENE[None], mx.array(SCENE)[None], [[1.0]], None, "a.jpg", {1.0}, INTEGERS]
)
def test_wrong_pixels_are_refused(pixels: Any, demo: tuple[MobileCLIP, Processor]) -> None:
    with pytest.raises(ImageError, match="pass what the processor returns for an image"):
        demo[0].encode_image(pixels)


@pytest.mark.parametrize("ids", [["a circle"], "a circle", None, {1}, np.zeros((1, 77)), [[1, 2]]])
def test_wrong_ids_are_refused(ids: Any, demo: tuple[MobileCLIP, Processor]) -> None:
    with pytest.raises(PromptError, match=r"pass what Processor\.texts returns"):
        demo[0].encode_text(ids)


@pytest.mark.parametrize("images", [7, None, {"a.jpg"}, iter([SCENE]), "a.jpg", b"x", [], {}])
def test_wrong_lists_of_images_are_refused(images: Any, demo: tuple[MobileCLIP, Processor]) -> None:
    with pytest.raises(ImageError, match="takes a list of at least one image"):
        demo[1].images(images)
