"""Identify what embeddings depend on besides the input: weights, config and tokenizer.

Caches and resume logs store it, so that they are not used with another model.
"""

import numpy as np

from ..caching.fingerprint import fingerprint
from ..models.clip import MobileCLIP
from ..preprocess.processor import Processor
from .pipeline import text_tower

# Tokenizers differ in how they repair such text (with ftfy or without).
TOKENIZER_PROBE = "\u201cMojibake\u201d doesn\u00e2\u20ac\u2122t &amp; shouldn't  matter \uff21"


def image_identity(model: MobileCLIP) -> str:
    """Hash of the image tower, its config and the preprocessing: 64 hexadecimal digits."""
    return fingerprint(model.image, model.config.image, model.config.preprocess)


def text_identity(model: MobileCLIP, processor: Processor) -> tuple[str, list[list[int]]]:
    """Hash of the text tower and its config, and the token ids of a probe text.

    Raises:
        ModelError: the model has no text tower.
    """
    tower = fingerprint(text_tower(model)[0], model.config.text)
    ids: list[list[int]] = np.asarray(processor.texts([TOKENIZER_PROBE])).tolist()
    return tower, ids
