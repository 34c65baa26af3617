"""Preprocessing of FastVLM: bit-equal to the reference steps, and its limits."""

import io
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
from PIL import Image

from mlx_fastvlm import ImageError, Processor, load
from mlx_mobileclip.preprocess.image import open_image, resize_crop, resize_pad, to_array

SIZES = [
    (1, 1), (1, 9), (9, 1), (2, 3), (640, 480), (480, 640), (1023, 1025), (257, 255),
    (2000, 3), (3, 2000), (1024, 1024), (33, 1500), (1500, 33),
]  # fmt: skip


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def reference_pad(image: Image.Image, size: int) -> np.ndarray:
    """Apple's steps one by one: black square, bicubic resize, scale to [0, 1]."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = square.resize((size, size), Image.Resampling.BICUBIC)
    return (np.array(resized) * (1 / 255)).astype(np.float32)


def reference_crop(image: Image.Image, size: int) -> np.ndarray:
    """CLIPImageProcessor's steps: shortest edge to size, centre crop, scale to [0, 1]."""
    width, height = image.size
    scale = size / min(width, height)
    wide = width > height
    shape = (int(size * width / height), size) if wide else (size, int(size * height / width))
    assert abs(shape[0] - width * scale) < 1.001
    array = np.array(image.resize(shape, Image.Resampling.BICUBIC))
    top, left = (shape[1] - size) // 2, (shape[0] - size) // 2
    return (array[top : top + size, left : left + size] * (1 / 255)).astype(np.float32)


@pytest.mark.parametrize("size", [256, 1024])
@pytest.mark.parametrize("shape", SIZES)
def test_pad_is_bit_equal_to_the_reference(shape: tuple[int, int], size: int) -> None:
    image = noise(*shape)
    assert np.array_equal(to_array(resize_pad(image, size)), reference_pad(image, size))


@pytest.mark.parametrize("shape", [s for s in SIZES if max(s) / min(s) <= 50 and min(s) > 2])
def test_crop_is_bit_equal_to_the_reference(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    assert np.array_equal(to_array(resize_crop(image, 256)), reference_crop(image, 256))


def test_crop_refuses_elongated_images() -> None:
    with pytest.raises(ImageError, match="too elongated"):
        resize_crop(noise(2000, 3), 1024)


def test_padding_of_elongated_images_allocates_no_full_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    created = []
    make = Image.new
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *rest: created.append(size) or make(mode, size, *rest)
    )
    for shape in ((8, 16384), (16384, 8)):
        created.clear()
        resize_pad(Image.fromarray(np.zeros((shape[1], shape[0], 3), np.uint8)), 1024)
        assert max(width * height for width, height in created) <= 1024 * 16384


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return load(synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2"))[1]


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_every_kind_of_source_gives_the_same_pixels(processor: Processor, tmp_path: Path) -> None:
    image = noise(60, 40)
    path = tmp_path / "a b.png"
    path.write_bytes(encoded(image))
    sources = [image, np.array(image), encoded(image), path, str(path)]
    pixels = [np.array(processor("a", source).pixels) for source in sources]
    assert pixels[0].shape == (1, 256, 256, 3) and pixels[0].dtype == np.float32
    assert all(np.array_equal(pixels[0], other) for other in pixels[1:])
    assert np.array_equal(pixels[0][0], reference_pad(image, 256))


@pytest.mark.parametrize(("resolution", "tokens"), [(128, 4), (256, 16), (1024, 256), (1536, 576)])
def test_resolution_sets_the_number_of_ids(
    processor: Processor, resolution: int, tokens: int
) -> None:
    inputs = processor("a", noise(5, 7), resolution=resolution)
    assert inputs.pixels is not None and inputs.pixels.shape == (1, resolution, resolution, 3)
    assert int((inputs.input_ids < 0).sum().item()) == tokens


@pytest.mark.parametrize("resolution", [0, 64, 300, 1600, True, 512.0])
def test_bad_resolutions_are_refused(processor: Processor, resolution: Any) -> None:
    with pytest.raises(ImageError, match="128 to 1536 in steps of 64"):
        processor("a", noise(5, 7), resolution=resolution)


def test_images_inside_messages_and_beside_them(processor: Processor) -> None:
    a, b = noise(20, 20, 1), noise(20, 20, 2)
    parts = [{"type": "image", "image": b}, {"type": "image"}]
    inputs = processor([{"role": "user", "content": parts}], [a])
    assert np.array_equal(
        np.array(inputs.pixels), np.stack([reference_pad(i, 256) for i in (b, a)])
    )


def test_prompt_without_images(processor: Processor) -> None:
    inputs = processor("hello")
    assert inputs.pixels is None and inputs.input_ids.dtype == mx.int32


def opened_with_orientation(orientation: int) -> np.ndarray:
    """Pixels of an image opened with an EXIF orientation."""
    image = noise(30, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return np.array(open_image(encoded(image, "PNG", exif=exif)))


def test_exif_orientation_is_applied() -> None:
    plain = opened_with_orientation(1)
    assert np.array_equal(opened_with_orientation(3), np.rot90(plain, 2))
    assert np.array_equal(opened_with_orientation(6), np.rot90(plain, -1))
    assert np.array_equal(opened_with_orientation(2), plain[:, ::-1])


def test_image_modes_are_converted_to_rgb() -> None:
    grey = noise(8, 8).convert("L")
    expected = np.array(grey.convert("RGB"))
    for mode in ("L", "LA", "RGBA", "P", "1"):
        image = grey.convert(mode)
        assert np.array_equal(np.array(open_image(image)), np.array(image.convert("RGB")))
    deep = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    assert deep.mode.startswith("I;16")
    assert np.array_equal(np.array(open_image(deep)), expected)
    assert np.array_equal(np.array(open_image(encoded(deep))), expected)
    cmyk = noise(8, 8).convert("CMYK")
    assert np.array_equal(
        np.array(open_image(encoded(cmyk, "TIFF"))), np.array(cmyk.convert("RGB"))
    )


def test_first_frame_of_an_animation_is_used() -> None:
    frames = [noise(8, 8, i).convert("P") for i in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.array(open_image(data)), np.array(frames[0].convert("RGB")))


def test_uint8_ones_are_not_taken_for_scaled_floats(processor: Processor) -> None:
    pixels = processor("a", np.ones((9, 9, 3), np.uint8)).pixels
    assert pixels is not None and pixels.max().item() == np.float32(1 / 255)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((4,), np.uint8),
     np.zeros((0, 4, 3), np.uint8)],
)  # fmt: skip
def test_bad_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError):
        open_image(array)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/cat.jpg", "URLs are not opened; download"),
        ("no/such/file.jpg", "no such file"),
        (".", "is a directory"),
        (7, "an image cannot be a int"),
        (b"", "not an image in JPEG"),
        (b"%PDF-1.4", "not an image in JPEG"),
    ],
)
def test_unusable_sources_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_image(source)


def test_12_megapixel_photo_is_quick(processor: Processor) -> None:
    """Well within a second on a busy machine; bench/ measures it properly."""
    image = noise(4032, 3024).resize((4032, 3024))
    data = encoded(image, "JPEG", quality=85)
    started = time.perf_counter()
    processor("a", data, resolution=1024)
    assert time.perf_counter() - started < 2
