"""One name for what a model computes, taken from its weights rather than from where they lay."""

import hashlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .checkpoint import named_parameters


def fingerprint(module: nn.Module, *settings: object) -> str:
    """Hash a module's weights, with names, shapes and dtypes, and the settings that go with them.

    Args:
        module: A model or one of its towers.
        settings: What else decides the result, such as a config; hashed as its `repr`.

    Returns:
        64 hexadecimal digits; about 0.15 s for a text tower in float32.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in sorted(named_parameters(module).items()):
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        # numpy has no bfloat16; the bits are all that counts here.
        bits = value.view(mx.uint16) if value.dtype == mx.bfloat16 else value
        digest.update(np.ascontiguousarray(np.asarray(bits)).data)
    return digest.hexdigest()
