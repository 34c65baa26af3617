"""FastVLM: image tower, projector and decoder (arXiv:2412.13303; apple/ml-fastvlm 592b4ad)."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mobileclip.concurrency import register_thread
from mlx_mobileclip.errors import ConfigError, ImageError, PromptError
from mlx_mobileclip.layers import GELU, Linear
from mlx_mobileclip.models.fastvit import FastViT
from mlx_mobileclip.quantization import quantize_layers

from .config import FastVLMConfig
from .kv_cache import STEP, KVCache
from .qwen2 import Qwen2

# Placeholder id of one image embedding, as in LLaVA; not in any vocabulary.
IMAGE_TOKEN = -200
# Parts that can be quantised separately, with the prefixes of their parameters.
PARTS = {"decoder": "language_model.", "projector": "projector.", "vision": "vision_tower."}


class FastVLM(nn.Module):
    """The whole model. Image embeddings replace the IMAGE_TOKEN ids of a prompt."""

    def __init__(self, config: FastVLMConfig):
        super().__init__()
        self.config = config
        self.vision_tower = FastViT(config.vision)
        width = config.text.hidden_size
        inputs = [config.vision.features] + [width] * config.projector_depth
        self.projector = [Linear(inputs[i], width) for i in range(config.projector_depth)]
        self.act = GELU()  # between the projector's layers
        self.language_model = Qwen2(config.text)
        quantize_layers(self, config.quantization)
        self._group: mx.distributed.Group | None = None  # processes that share the decoder

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, where mlx-lm looks for them."""
        return list(self.language_model.layers)

    def make_cache(self, capacity: int = STEP, bits: int | None = None) -> list[KVCache]:
        """One empty KV cache per decoder layer.

        Args:
            capacity: Number of tokens to allocate.
            bits: 8 or 4 to quantise keys and values; None for floats.

        Raises:
            ConfigError: MLX cannot quantise heads of this width.
        """
        if bits not in (None, 4, 8) or isinstance(bits, float):
            raise ConfigError(f"kv_bits is {bits!r:.40}; it must be 8 or 4")
        if bits is not None and self.config.text.head_dim % 32:
            raise ConfigError(
                f"kv_bits needs heads whose width is a multiple of 32, not "
                f"{self.config.text.head_dim}; leave it out"
            )
        return self.language_model.make_cache(capacity, bits)

    def encode_image(self, pixels: mx.array) -> mx.array:
        """Encode images as embeddings of the decoder's width.

        Args:
            pixels: RGB in [0, 1], (n, S, S, 3), S a multiple of 64.

        Returns:
            (n, N, D) with N = (S/64)^2, in row-major order: 256 at S = 1024.

        Raises:
            ImageError: the shape is not (n, S, S, 3) with S a multiple of the tower's stride.
        """
        register_thread()
        stride = self.config.vision.stride
        if pixels.ndim != 4 or pixels.shape[3] != 3 or any(s % stride for s in pixels.shape[1:3]):
            raise ImageError(
                f"pixels have shape {pixels.shape}; expected (n, S, S, 3), S a multiple of {stride}"
            )
        return self.project(self.vision_tower(pixels))

    def project(self, x: mx.array) -> mx.array:
        """Project the tower's feature maps (n, s, s, C) to embeddings (n, s * s, D)."""
        x = x.reshape(x.shape[0], -1, x.shape[3])
        for i, layer in enumerate(self.projector):
            x = layer(self.act(x) if i else x)
        return x

    def embed(self, input_ids: mx.array, image_features: mx.array | None = None) -> mx.array:
        """Embed tokens, with image embeddings in place of IMAGE_TOKEN, in order.

        Args:
            input_ids: (B, L).
            image_features: (n, N, D) from `encode_image`, used row by row of the batch.

        Returns:
            (B, L, D).

        Raises:
            PromptError: the number of IMAGE_TOKEN ids is not n * N.
        """
        register_thread()
        flat_ids = np.array(input_ids).reshape(-1)
        positions = np.flatnonzero(flat_ids == IMAGE_TOKEN)
        given = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if len(positions) != given:
            raise PromptError(
                f"the prompt has places for {len(positions)} image embeddings but {given} are given"
            )
        vocab_size = self.config.text.vocab_size
        if np.any((flat_ids >= vocab_size) | ((flat_ids < 0) & (flat_ids != IMAGE_TOKEN))):
            raise PromptError(f"a token id is outside the vocabulary of {vocab_size}")
        x = self.language_model.embed(mx.maximum(input_ids, 0))
        if image_features is None or not given:
            return x
        flat = x.reshape(-1, x.shape[-1])
        flat[mx.array(positions)] = image_features.reshape(given, -1).astype(x.dtype)
        return flat.reshape(x.shape)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        *,
        pixels: mx.array | None = None,
        last_only: bool = False,
    ) -> mx.array:
        """Logits of the token after each position.

        Args:
            inputs: Token ids, (B, L), one IMAGE_TOKEN for each image embedding.
            cache: One KV cache per layer, extended in place.
            input_embeddings: (B, L, D) from `embed`, instead of ids and pixels.
            pixels: Images in the order of their places in the prompt, (n, S, S, 3).
            last_only: Compute the logits of the last position alone.

        Returns:
            (B, L, V), or (B, 1, V) with `last_only`.
        """
        register_thread()
        if input_embeddings is None and (pixels is not None or inputs.shape[1] > 1):
            # A single id is a decode step, which must not wait for the host.
            features = None if pixels is None else self.encode_image(pixels)
            input_embeddings = self.embed(inputs, features)
        return self.language_model(inputs, cache, input_embeddings, last_only=last_only)
