"""MobileCLIP at full size against open_clip and timm, given the same random checkpoints."""

import random
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import synthetic_clip
import torch
from PIL import Image
from synthetic_clip import PUBLISHED, listing, values
from tolerances import HALF_PRECISION_COSINE, STAGE_FLOAT32, relative_error

from mlx_mobileclip import MobileCLIP, Processor
from mlx_mobileclip.checkpoints.mobileclip import MOBILECLIP_LAYOUTS, canonical_tensors
from mlx_mobileclip.layers import whole
from mlx_mobileclip.models.fastvit import FinalConv, Stage, Stem
from mlx_mobileclip.models.transformer import TransformerLayer
from mlx_mobileclip.models.variants import VARIANTS
from mlx_mobileclip.preprocess import tokenizer
from mlx_mobileclip.preprocess.tokenizer import clip_tokenizer

import open_clip  # isort: skip (after oracle, which makes torchvision importable)
from timm.utils.model import reparameterize_model  # isort: skip

pytestmark = pytest.mark.parity

APPLE, OPEN_CLIP, TIMM = MOBILECLIP_LAYOUTS
COSINE = 0.99999
# Every architecture that open_clip builds; the other variants differ from one in name alone.
BUILT = {
    "MobileCLIP-S1": "MobileCLIP-S1",
    "MobileCLIP-S2": "MobileCLIP-S2",
    "MobileCLIP-B:open_clip": "MobileCLIP-B",
    "MobileCLIP-B": "MobileCLIP-B",  # with Apple's padding and epsilon put in
    "MobileCLIP2-S0": "MobileCLIP2-S0",
    "MobileCLIP2-S2": "MobileCLIP2-S2",
    "MobileCLIP2-B": "MobileCLIP2-B",
    "MobileCLIP2-S3": "MobileCLIP2-S3",
    "MobileCLIP2-S4": "MobileCLIP2-S4",
    "MobileCLIP2-L-14": "MobileCLIP2-L-14",
}
TAGS = {"MobileCLIP-S1": "datacompdr", "MobileCLIP-S2": "datacompdr", "MobileCLIP-B": "datacompdr"}
TEXTS = ["a photo of a cat", "", "Two dogs & a 3rd one play in the snow, 日本! 😀"]


def photos(size: int) -> np.ndarray:
    """Three different images: dark with a gradient, bright with stripes, noise."""
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    dark = np.stack([0.3 * x, 0.2 * y, 0.1 * x * y], axis=-1)
    stripes = np.stack([0.5 + 0.5 * np.sin(40 * x), 0.9 - 0.2 * y, np.cos(9 * y) ** 2], axis=-1)
    noise = np.random.default_rng(0).random((size, size, 3))
    return np.stack([dark, stripes, noise]).astype(np.float32)


@contextmanager
def our_outputs(*classes: type) -> Iterator[dict[int, list[mx.array]]]:
    """Outputs of our modules of these classes, in order; a batch may pass in several parts."""
    outputs: dict[int, list[mx.array]] = {}

    def recording(call: Any) -> Any:
        def inner(self: Any, *arguments: Any, **named: Any) -> Any:
            output = call(self, *arguments, **named)
            outputs.setdefault(id(self), []).append(whole(output))
            return output

        return inner

    with pytest.MonkeyPatch.context() as patch:
        for kind in classes:
            patch.setattr(kind, "__call__", recording(kind.__call__))
        yield outputs


def reference(variant: str, tensors: synthetic_clip.Tensors) -> Any:
    """open_clip's model with the given weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(BUILT[variant])
    state = {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in tensors.items()}
    model.load_state_dict(state, strict=True)
    if variant == "MobileCLIP-B":
        trunk = model.visual.trunk
        trunk.patch_embed.backbone[0].conv.padding = (1, 1)
        for module in trunk.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
    return model.eval()


def ours(variant: str, tensors: dict[str, Any], layout: Any = OPEN_CLIP) -> MobileCLIP:
    config = VARIANTS[variant]
    arrays = {key: mx.array(np.asarray(value)) for key, value in tensors.items()}
    model = MobileCLIP(config)
    weights = canonical_tensors(arrays, config, layout, variant)
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    return model


def assert_close(found: mx.array, expected: np.ndarray, stage: str) -> None:
    """Bound the error of a stage; of embeddings also direction and differences of rows."""
    assert relative_error(found, expected) < STAGE_FLOAT32, stage
    if expected.ndim == 2:
        a, b = np.asarray(found, np.float64), expected.astype(np.float64)
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() > COSINE, stage
        assert relative_error(a - a.mean(0), b - b.mean(0)) < 1e-3, stage


@pytest.mark.parametrize("variant", BUILT)
def test_both_towers_stage_by_stage(variant: str) -> None:
    tensors = values(listing(variant.partition(":")[0], "open_clip"))
    torch_model = reference(variant, tensors)
    trunk, text = torch_model.visual.trunk, torch_model.text
    vit = hasattr(trunk, "blocks")
    parts = list(trunk.blocks) if vit else [trunk.stem, *trunk.stages, trunk.final_conv]
    classes = (TransformerLayer,) if vit else (Stem, Stage, FinalConv)
    pixels = photos(VARIANTS[variant].preprocess.image_size)
    ids = clip_tokenizer()(TEXTS)
    with torch.no_grad():
        with oracle.recorded({f"image {i}": part for i, part in enumerate(parts)}) as stages:
            image = torch_model.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        blocks = {f"text {i}": part for i, part in enumerate(text.transformer.resblocks)}
        with oracle.recorded(blocks) as text_stages:
            text_rows = torch_model.encode_text(torch.from_numpy(ids.astype(np.int64)))
    states = [tensors]
    if not vit:
        fused = reparameterize_model(torch_model)
        states.append({k: v.numpy() for k, v in fused.state_dict().items()})
        assert len(states[1]) < len(tensors)
    for state in states:
        model = ours(variant, dict(state))
        with our_outputs(*classes) as found:
            mx.eval(image_found := model.encode_image(mx.array(pixels)))
        for (what, expected), value in zip(stages.items(), found.values(), strict=True):
            assert_close(mx.concatenate(value), expected, what)
        assert_close(image_found, image.numpy(), "image")
        with our_outputs(TransformerLayer) as found:
            mx.eval(text_found := model.encode_text(mx.array(ids)))
        for (what, expected), value in zip(text_stages.items(), found.values(), strict=True):
            assert_close(mx.concatenate(value), expected, what)
        assert_close(text_found, text_rows.numpy(), "text")
        assert model.logit_scale is not None
        assert abs(model.logit_scale.item() - torch_model.logit_scale.item()) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", ["MobileCLIP-S0", "MobileCLIP-S1", "MobileCLIP-S2"])
def test_apple_image_tower_equals_timm(variant: str, fused: bool) -> None:
    """S0 too, whose text tower is compared with formulas elsewhere."""
    import timm

    tensors = values(listing(variant, "apple", fused))
    model = ours(variant, tensors, APPLE)
    name = "fastvit_mci" + variant[-1]
    trunk = timm.create_model(name, num_classes=512, inference_mode=fused)
    prefix = "visual.trunk."
    state = {
        key[len(prefix) :]: torch.from_numpy(np.ascontiguousarray(value))
        for key, value in synthetic_clip.open_clip_tensors(tensors).items()
        if key.startswith(prefix)
    }
    trunk.load_state_dict(state, strict=True)
    pixels = photos(256)
    with torch.no_grad():
        expected = trunk.eval()(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()
    assert_close(model.encode_image(mx.array(pixels)), expected, variant)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_texts_stay_apart_in_half_precision(dtype: mx.Dtype) -> None:
    """Each text is close to float32, and so is the difference of the two."""
    tensors = values(listing("MobileCLIP2-S0", "open_clip"))
    ids = clip_tokenizer()([TEXTS[0], TEXTS[2]])
    with torch.no_grad():
        ids64 = torch.from_numpy(ids.astype(np.int64))
        expected = reference("MobileCLIP2-S0", tensors).encode_text(ids64, normalize=True).numpy()
    model = ours("MobileCLIP2-S0", tensors)
    model.set_dtype(dtype)
    found = np.array(model.encode_text(mx.array(ids), normalize=True))
    assert (found * expected).sum(-1).min() > HALF_PRECISION_COSINE
    a, b = found[0] - found[1], expected[0] - expected[1]
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > HALF_PRECISION_COSINE


def test_other_variants_have_a_tested_architecture() -> None:
    def shape(name: str) -> Any:
        config = VARIANTS[name]
        return config.image, config.text, config.embed_dim

    covered = [shape(name) for name in BUILT]
    assert {name for name in PUBLISHED if shape(name) not in covered} == {"MobileCLIP-S0"}


@pytest.mark.parametrize("name", sorted(set(BUILT.values())))
def test_pixels_equal_open_clip(name: str) -> None:
    given = open_clip.get_pretrained_cfg(name, TAGS.get(name, "dfndr2b"))
    preprocess = VARIANTS[name].preprocess
    assert tuple(given["mean"]) == preprocess.mean and tuple(given["std"]) == preprocess.std
    assert given["interpolation"] == preprocess.interpolation
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    assert size == preprocess.image_size
    transform = open_clip.image_transform(
        size,
        is_train=False,
        mean=given["mean"],
        std=given["std"],
        interpolation=given["interpolation"],
        resize_mode=given["resize_mode"],
    )
    processor = Processor(preprocess)
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 40), (size, size), (size + 1, size), (size, size + 3), (3000, 2001)]
    sizes += [tuple(rng.integers(40, 900, 2)) for _ in range(40)]
    for width, height in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = transform(image).numpy().transpose(1, 2, 0)
        assert np.array_equal(processor.pixels(image), expected), (width, height)
    for mode in ("L", "RGBA", "P", "CMYK", "LA", "1"):
        # Converted first, as Apple's examples do: resized palettes would be nearest neighbours.
        image = Image.fromarray(rng.integers(0, 256, (77, 133, 3), dtype=np.uint8)).convert(mode)
        expected = transform(image.convert("RGB")).numpy().transpose(1, 2, 0)
        assert np.array_equal(processor.pixels(image), expected), mode


BLANK = ("Cn", "Cs", "Co")  # unassigned, surrogate, private use
NASTY = [
    "",
    " ",
    "a photo of a cat",
    "  A PHOTO of\n a   Cat &amp;amp; dog\u2019s \u201ctoy\u201d",
    "naïve café 123 ½ 日本語 😀",
    "\x1c\x1d a\x00b\x07c\x85d\xa0e\u200bf\u2028g \x1b[31mred",
    "x" * 10_000,
    "word " * 5_000,
    "ab😀é" * 2_500,
    "'S 'ſ don't I'LL we'Ve 'ẞ İstanbul ǅ 's's''s",
    "ﬁne ﬂow ＡＢＣ！ ㎏ ① Ⅷ ² ³ 〇",
    "a</w>b </w> Ġ ĠĠ &lt;b&gt; &#x1F600; &nbsp;x &amp;lt;",
    "🏳️\u200d🌈👨\u200d👩\u200d👧\u200d👦 ☃︎ \ufeff 👍🏽",
    "عربى हिन्दी ไทย 한국어 Ελληνικά Русский עברית",
    "schÃ¶n âœ” doesnâ€™t l\u2019humanitÃ©",
    "e\u0301 \u0301x Å K Ω",
    "#$%^&*()!!! ... —— _under_score_ <tag> {brace}",
    "\u180e \u2060 \u00ad soft\u00adhyphen \ue000 \U0010ffff",
    "<|endoftext|> <|startoftext|>",
]


def corpus() -> list[str]:
    """NASTY, and random texts of assigned code points."""
    rng = random.Random(0)
    ranges = ((32, 127), (0x20, 0x250), (0x20, 0x3100), (0x20, 0xD7FF), (0x1F300, 0x1FB00))
    result = list(NASTY)
    while len(result) < 5_000:
        drawn = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40))]
        # The regex package differs about unassigned characters and U+0345.
        result.append(
            "".join(c for c in drawn if unicodedata.category(c) != "Cn" and c != "\u0345")
        )
    return result


@pytest.mark.filterwarnings("ignore:text ")
def test_ids_equal_open_clip() -> None:
    pytest.importorskip("ftfy", reason="open_clip mends texts with ftfy")
    theirs = open_clip.get_tokenizer("MobileCLIP-S1")
    texts = corpus()
    assigned = [chr(c) for c in range(0x20, 0x30000) if unicodedata.category(chr(c)) not in BLANK]
    texts += [f"x{c}1 !{c}" for c in assigned]
    expected, found = theirs(texts).numpy(), clip_tokenizer()(texts)
    different = [texts[i] for i in np.flatnonzero((expected != found).any(axis=1))]
    assert not different, different[:3]


@pytest.mark.filterwarnings("ignore:text ")
def test_ids_without_ftfy_equal_open_clip_for_sound_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but wrongly decoded text, terminal escapes and private or C1 control characters."""
    theirs = open_clip.get_tokenizer("MobileCLIP-S1")
    monkeypatch.setattr(tokenizer, "_text_fixer", lambda: tokenizer._fix_text)
    texts = [t for t in NASTY if "Ã" not in t and "\x1b" not in t]
    texts += ["\u201cCurly\u201d \u2018quotes\u2019 \u2014 dashes\u2026", "ＷＩＤＥ ﬃ"]
    expected, found = theirs(texts).numpy(), clip_tokenizer()(texts)
    assert [t for t, same in zip(texts, (expected == found).all(1), strict=True) if not same] == []
