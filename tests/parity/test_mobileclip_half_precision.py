"""MobileCLIP in half precision, at full size, against PyTorch in float32.

Half precision is slow on a CPU, hence one image and one text. The variants left out differ from
one of these only in name, in weights, or in parts that are compared in float32 (S0's text tower,
Apple's stem of B).
"""

import mlx.core as mx
import numpy as np
import pytest
import torch
from synthetic_clip import listing, values
from test_mobileclip_parity import ours, photos, reference
from tolerances import HALF_PRECISION_COSINE

from mlx_mobileclip.models.variants import VARIANTS
from mlx_mobileclip.preprocess.tokenizer import clip_tokenizer

pytestmark = pytest.mark.parity
VARIANTS_BUILT = [
    "MobileCLIP-S1",
    "MobileCLIP-S2",
    "MobileCLIP2-S0",
    "MobileCLIP2-B",
    "MobileCLIP2-S3",
    "MobileCLIP2-S4",
    "MobileCLIP2-L-14",
]


def cosine(found: mx.array, expected: torch.Tensor) -> float:
    a, b = np.array(found, np.float64), expected.numpy().astype(np.float64)
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("variant", VARIANTS_BUILT)
def test_half_precision_at_full_size(variant: str) -> None:
    tensors = values(listing(variant, "open_clip"))
    theirs = reference(variant, tensors)
    pixels = photos(VARIANTS[variant].preprocess.image_size)[:1]
    ids = clip_tokenizer()(["a photo of a cat"])
    with torch.no_grad():
        image = theirs.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        text = theirs.encode_text(torch.from_numpy(ids.astype(np.int64)))
    for dtype in (mx.bfloat16, mx.float16):
        model = ours(variant, tensors)
        model.set_dtype(dtype)
        assert cosine(model.encode_image(mx.array(pixels)), image) > HALF_PRECISION_COSINE, dtype
        assert cosine(model.encode_text(mx.array(ids)), text) > HALF_PRECISION_COSINE, dtype
