"""The fourteen published models: towers and preprocessing.

Causality, preprocessing, stem padding and epsilon cannot be inferred from the tensors.

Source: apple/ml-mobileclip 4144bb1 `mobileclip/configs`, `mobileclip2/model_configs`, open_clip
3.3.0 `pretrained.py`, and the model cards.
"""

import re
from dataclasses import replace

from .clip import MobileCLIPConfig, PreprocessConfig
from .fastvit import PRESETS, FastViTConfig
from .text import TextConfig
from .vit import ViTConfig

PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TEXT_512 = TextConfig(
    width=512,
    layers=12,
    heads=8,
    vocab_size=49408,
    context_length=77,
    causal=False,
    rep_mixers=False,
)
TEXT_512_CAUSAL = replace(TEXT_512, causal=True)
TEXT_768 = replace(TEXT_512, width=768, heads=12)
TEXT_HYBRID = replace(TEXT_512, layers=4, rep_mixers=True)

VIT_B_APPLE = ViTConfig(
    stem="convolutional",
    image_size=224,
    patch_size=16,
    width=768,
    layers=12,
    heads=12,
    stem_padding=1,
    eps=1e-5,
)
VIT_B_TIMM = replace(VIT_B_APPLE, stem_padding=0, eps=1e-6)
VIT_L = ViTConfig(
    stem="patch",
    image_size=224,
    patch_size=14,
    width=1024,
    layers=24,
    heads=16,
    stem_padding=0,
    eps=1e-5,
)


def _variant(
    name: str,
    image: FastViTConfig | ViTConfig,
    text: TextConfig,
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = PLAIN,
    interpolation: str = "bilinear",
) -> MobileCLIPConfig:
    size = image.image_size if isinstance(image, ViTConfig) else 256
    preprocess = PreprocessConfig(size, interpolation, *normalization)
    return MobileCLIPConfig(name, text.width, image, text, preprocess)


VARIANTS = {
    config.variant: config
    for config in (
        _variant("MobileCLIP-S0", PRESETS["mci0"], TEXT_HYBRID),
        _variant("MobileCLIP-S1", PRESETS["mci1"], TEXT_512),
        _variant("MobileCLIP-S2", PRESETS["mci2"], TEXT_512),
        _variant("MobileCLIP-B", VIT_B_APPLE, TEXT_512_CAUSAL),
        _variant("MobileCLIP-B-LT", VIT_B_APPLE, TEXT_512_CAUSAL),
        _variant("MobileCLIP-S3", PRESETS["mci3"], TEXT_768, OPENAI),
        _variant("MobileCLIP-S4", PRESETS["mci4"], TEXT_768, OPENAI),
        _variant("MobileCLIP-L-14", VIT_L, TEXT_768, OPENAI, "bicubic"),
        _variant("MobileCLIP2-S0", PRESETS["mci0"], TEXT_512),
        _variant("MobileCLIP2-S2", PRESETS["mci2"], TEXT_512),
        _variant("MobileCLIP2-B", VIT_B_TIMM, TEXT_512_CAUSAL),
        _variant("MobileCLIP2-S3", PRESETS["mci3"], TEXT_768, OPENAI),
        _variant("MobileCLIP2-S4", PRESETS["mci4"], TEXT_768, OPENAI),
        _variant("MobileCLIP2-L-14", VIT_L, TEXT_768, OPENAI, "bicubic"),
        # Apple's B as open_clip and timm run it, which differs from how it was trained.
        _variant("MobileCLIP-B:open_clip", VIT_B_TIMM, TEXT_512_CAUSAL),
        _variant("MobileCLIP-B-LT:open_clip", VIT_B_TIMM, TEXT_512_CAUSAL),
    )
}

# Name of an image tower in timm or Apple's code: a variant that has it. Others may share it.
TOWERS = {
    "fastvit_mci0": "MobileCLIP2-S0",
    "fastvit_mci1": "MobileCLIP-S1",
    "fastvit_mci2": "MobileCLIP2-S2",
    "fastvit_mci3": "MobileCLIP2-S3",
    "fastvit_mci4": "MobileCLIP2-S4",
    "vit_base_mci_224": "MobileCLIP2-B",
    "vit_large_patch14_clip_224": "MobileCLIP2-L-14",
    "mci0": "MobileCLIP-S0",
    "mci1": "MobileCLIP-S1",
    "mci2": "MobileCLIP-S2",
    "vit_b16": "MobileCLIP-B",
}


def _normalized(name: str) -> str:
    """Convert a name to lower case and remove separators."""
    return re.sub(r"[^a-z0-9:]", "", name.lower())


_BY_NORMALIZED_NAME = {_normalized(name): name for name in VARIANTS}


def variant_named(name: str) -> str | None:
    """Find a variant by name, ignoring case and separators; None if there is none."""
    return _BY_NORMALIZED_NAME.get(_normalized(name))
