"""MobileCLIP: towers against formulas, tokenizer, preprocessing and Python interface."""

import io
import subprocess
import sys
import threading
from pathlib import Path

import clip_formulas
import mlx.core as mx
import numpy as np
import pytest
import synthetic_clip
from PIL import Image
from synthetic_clip import tiny_config, tiny_shapes, values
from tolerances import FOLD_FLOAT32, relative_error

from mlx_mobileclip import ImageError, MobileCLIP, Processor, PromptError, load
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.models.clip import MobileCLIPConfig
from mlx_mobileclip.models.variants import VARIANTS
from mlx_mobileclip.preprocess import tokenizer
from mlx_mobileclip.preprocess.tokenizer import clip_tokenizer

APPLE = mobileclip.MOBILECLIP_LAYOUTS[0]
# Ids by open_clip 3.3.0, without start and end tokens.
GOLDEN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "  A PHOTO of\n a   Cat &amp;amp; dog\u2019s \u201ctoy\u201d": [
        *(320, 1125, 539, 320, 2368, 261, 1929, 568, 257, 5988, 257),
    ],
    "naïve café 123 ½ 日本語 😀": [
        *(1097, 35689, 563, 15304, 272, 273, 274, 33613, 39121, 44353, 34002, 508, 7334),
    ],
    "": [],
}


def apple_model(
    config: MobileCLIPConfig, variant: str, fused: bool = False
) -> tuple[MobileCLIP, synthetic_clip.Tensors]:
    shapes = tiny_shapes if config.embed_dim < 512 else synthetic_clip.listing
    tensors = values(shapes(variant, "apple", fused))
    arrays = {key: mx.array(value) for key, value in tensors.items()}
    model = MobileCLIP(config)
    model.load_weights(list(mobileclip.canonical_tensors(arrays, config, APPLE, "test").items()))
    return model, tensors


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.parity)])
@pytest.mark.parametrize("fused", [False, True])
def test_hybrid_text_tower_follows_the_formulas(full: bool, fused: bool) -> None:
    config = VARIANTS["MobileCLIP-S0"] if full else tiny_config("MobileCLIP-S0")
    model, tensors = apple_model(config, "MobileCLIP-S0", fused)
    assert fused == any("text_encoder" in key and "reparam" in key for key in tensors)
    ids = clip_tokenizer()(["a photo of a cat", "", "two dogs, " * 20 + "in the snow"])
    assert config.text is not None
    reference = clip_formulas.hybrid_text(tensors, ids, config.text.heads)
    assert relative_error(model.encode_text(mx.array(ids)), reference) < FOLD_FLOAT32


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.parity)])
@pytest.mark.parametrize("variant", ["MobileCLIP-B", "MobileCLIP-B:open_clip"])
def test_vit_b_follows_the_formulas(variant: str, full: bool) -> None:
    config = VARIANTS[variant] if full else tiny_config(variant)
    model, tensors = apple_model(config, "MobileCLIP-B")
    size = config.preprocess.image_size
    pixels = np.random.default_rng(0).random((2, size, size, 3))
    padding, eps = (0, 1e-6) if ":" in variant else (1, 1e-5)
    heads = 12 if full else 2
    reference = clip_formulas.vit_b(tensors, pixels, heads, padding, eps)
    found = model.encode_image(mx.array(pixels.astype(np.float32)))
    assert relative_error(found, reference) < FOLD_FLOAT32
    other = clip_formulas.vit_b(tensors, pixels, heads, 1 - padding, eps)
    assert relative_error(found, other) > 1e-2


# Text.


@pytest.mark.parametrize("text", GOLDEN)
@pytest.mark.parametrize("ftfy", [True, False])
def test_ids_equal_open_clip(text: str, ftfy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ftfy:
        monkeypatch.setattr(tokenizer, "_text_fixer", lambda: tokenizer._fix_text)
    expected = np.zeros((1, 77), np.int32)
    ids = [49406, *GOLDEN[text], 49407]
    expected[0, : len(ids)] = ids
    assert np.array_equal(clip_tokenizer()([text]), expected)


def test_long_texts_are_truncated_with_a_warning() -> None:
    longest = "cat " * 75
    assert clip_tokenizer()([longest])[0].tolist() == [49406, *[2368] * 75, 49407]
    for text in ("cat " * 76, "dog " * 10_000):
        with pytest.warns(UserWarning, match="has 76 tokens|has more than 2500 tokens"):
            ids = clip_tokenizer()([text])
        assert ids.shape == (1, 77) and ids[0, -1] == 49407 and ids[0, 0] == 49406
    with pytest.warns(UserWarning, match="the model reads the first 75"):
        clip_tokenizer()(["x" * 10_000])
    with pytest.warns(UserWarning, match="has more than .* tokens; the model reads the first 75"):
        clip_tokenizer()(["a" * 2_000_000])


def test_special_tokens_cannot_be_typed() -> None:
    for text in ("<start_of_text>", "<end_of_text>", "<|endoftext|>", "&lt;end_of_text&gt;"):
        ids = clip_tokenizer()([text])[0]
        assert (ids == 49407).sum() == (ids == 49406).sum() == 1


def test_texts_must_be_a_list_of_strings() -> None:
    for texts in ("a cat", [], [1], b"a"):
        with pytest.raises(PromptError):
            clip_tokenizer()(texts)  # type: ignore[arg-type]


# Images.


def test_pixels_follow_the_reference() -> None:
    """Offsets of half a pixel round to even; the long side rounds down."""
    rng = np.random.default_rng(0)
    for variant, resample in (("MobileCLIP-S0", 2), ("MobileCLIP2-L-14", 3)):
        preprocess = VARIANTS[variant].preprocess
        size = preprocess.image_size
        for width, height in ((300, 303), (517, 301), (31, 64), (size, size), (1, 9), (640, 1000)):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            long = int(size * max(width, height) / min(width, height))
            shape = (size, long) if width <= height else (long, size)
            resized = np.asarray(image.resize(shape, Image.Resampling(resample)))
            top, left = (int(round((n - size) / 2)) for n in resized.shape[:2])  # noqa: RUF046
            square = resized[top : top + size, left : left + size].astype(np.float32)
            mean, std = np.float32(preprocess.mean), np.float32(preprocess.std)
            expected = (square / np.float32(255) - mean) / std
            found = np.asarray(Processor(preprocess).images([image]))[0]
            assert np.array_equal(found, expected), (variant, width, height)


def test_image_modes_arrays_and_exif() -> None:
    processor = Processor(VARIANTS["MobileCLIP2-S0"].preprocess)
    upright = Image.new("RGB", (40, 20), "red")
    upright.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    file = io.BytesIO()
    upright.save(file, "JPEG", exif=exif, quality=100, subsampling=0)
    turned = np.asarray(processor.images([file.getvalue()]))[0]
    assert turned[10, 128, 2] > 0.9 and turned[245, 128, 0] > 0.9
    modes = [Image.new(mode, (30, 20)) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16")]
    arrays = [np.zeros((5, 9, 3), np.uint8), np.zeros((5, 9), np.uint8)]
    assert processor.images([*modes, *arrays]).shape == (9, 256, 256, 3)
    for bad in ([], "cat.jpg", [np.zeros((4, 4000), np.uint8)], ["none.jpg"], [b"no image"]):
        with pytest.raises(ImageError):
            processor.images(bad)


# The interface.


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[MobileCLIP, Processor]:
    monkeypatch.setattr(mobileclip, "VARIANTS", {n: tiny_config(n) for n in VARIANTS})
    tensors = values(tiny_shapes("MobileCLIP2-S0", "open_clip"))
    return load(synthetic_clip.write(tmp_path / "mobileclip2_s0.pt", tensors))


def test_another_thread_can_use_the_model(tiny_model: tuple[MobileCLIP, Processor]) -> None:
    model, processor = tiny_model
    here = np.asarray(model.encode_text(processor.texts(["a cat"])))
    found = []

    def run() -> None:
        pixels = processor.images([np.zeros((9, 9, 3), np.uint8)])
        mx.eval(model.encode_image(pixels))
        found.append(np.asarray(model.encode_text(processor.texts(["a cat"]))))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert np.array_equal(found[0], here)


def test_arrays_of_wrong_shape_are_refused(tiny_model: tuple[MobileCLIP, Processor]) -> None:
    model, _ = tiny_model
    for shape in ((64, 64, 3), (1, 64, 64, 4), (0, 64, 64, 3)):
        with pytest.raises(ImageError):
            model.encode_image(mx.zeros(shape))
    for ids in (mx.zeros((1, 76), mx.int32), mx.zeros((77,), mx.int32), mx.full((1, 77), 49408)):
        with pytest.raises(PromptError):
            model.encode_text(ids)
    vit = MobileCLIP(tiny_config("MobileCLIP2-B"))
    with pytest.raises(ImageError, match="takes 64 x 64"):
        vit.encode_image(mx.zeros((1, 80, 80, 3)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["MobileCLIP-S0", "MobileCLIP-S1", "MobileCLIP-B"])
def test_half_precision_stays_close(variant: str, dtype: str) -> None:
    model, _ = apple_model(tiny_config(variant), variant)
    size = model.config.preprocess.image_size
    pixels = mx.array(np.random.default_rng(0).random((4, size, size, 3), dtype=np.float32))
    ids = mx.array(clip_tokenizer()(["a photo of a cat", "two dogs in the snow"]))
    exact = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    model.set_dtype(getattr(mx, dtype))
    found = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    for a, b in zip(exact, found, strict=True):
        assert b.dtype == mx.float32
        assert mx.sum(a * b, axis=-1).min().item() > 0.999


def test_embedding_imports_no_heavy_package(tmp_path: Path) -> None:
    """Neither embedding nor reading a .pt file does; only the optional ftfy is imported."""
    path = tmp_path / "mobileclip2_s0.pt"
    synthetic_clip.write(path, values(tiny_shapes("MobileCLIP2-S0", "open_clip")))
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from synthetic_clip import tiny_config
from mlx_mobileclip.checkpoints import mobileclip
mobileclip.VARIANTS = {{"MobileCLIP2-S0": tiny_config("MobileCLIP2-S0")}}
import mlx_mobileclip
model, processor = mlx_mobileclip.load({str(path)!r})
model.encode_text(processor.texts(["a cat"]))
heavy = {{"torch", "transformers", "mlx_lm", "huggingface_hub"}}
print(sorted(heavy & set(sys.modules)))
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
