"""Hashes of everything that embeddings depend on besides the input: weights, config, tokenizer.

Caches and resume logs store them, so that they are not used with another model.
"""

import hashlib

from .. import __version__
from ..caching.fingerprint import fingerprint
from ..models.clip import MobileCLIP
from ..preprocess.processor import Processor
from .pipeline import text_tower


def image_identity(model: MobileCLIP) -> str:
    """Hash of the image tower, its config and the preprocessing: 64 hexadecimal digits."""
    return fingerprint(model.image, model.config.image, model.config.preprocess)


def text_identity(model: MobileCLIP, processor: Processor) -> str:
    """Hash of the text tower, its config, the tokenizer and the package version: 64 hex digits.

    Raises:
        ModelError: the model has no text tower.
    """
    tower = fingerprint(text_tower(model)[0], model.config.text)
    content = (__version__, tower, processor.tokenizer.fingerprint)
    return hashlib.sha256(repr(content).encode()).hexdigest()
