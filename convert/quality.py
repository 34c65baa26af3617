"""What quantising costs: the packed model against the original on calibration pictures.

FastVLM is run part by part, each decoder layer's weights read when their turn comes and forgotten
after it, so that a model is measured in a fraction of the memory that it would take to run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.model import IMAGE_TOKEN, FastVLM
from mlx_fastvlm.processor import Processor
from mlx_mobileclip.checkpoint import as_dtype, assign
from mlx_mobileclip.clip import MobileCLIP, MobileCLIPConfig
from mlx_mobileclip.device import default_dtype
from mlx_mobileclip.processor import Processor as ClipProcessor

from .calibration import LABELS, Sample
from .quantize import Tensors

RESOLUTION = 512  # px at most; more image tokens would tell little more
HEAD_ROWS = 1 << 14  # rows of the output layer that are turned to floats at a time
Read = Callable[[], tuple[Any, Tensors]]


@dataclass(frozen=True)
class Size:
    """What the packed model takes; `per_token_bytes` are read for each token of an answer."""

    bits_per_weight: float
    disk_bytes: int
    per_token_bytes: int


def is_tied(config: Any) -> bool:
    """Whether the embedding is the output layer as well, and so is read for each token."""
    return isinstance(config, FastVLMConfig) and config.text.tie_word_embeddings


def size(weights: int, stored: Tensors, tied: bool) -> Size:
    """Size of a checkpoint that has so many weights and is stored in these tensors."""
    disk = sum(tensor.nbytes for tensor in stored.values())
    skipped = () if tied else ("language_model.embed_tokens.",)
    read = sum(
        tensor.nbytes
        for name, tensor in stored.items()
        if name.startswith("language_model.") and not name.startswith(skipped)
    )
    return Size(8 * disk / weights, disk, read)


# FastVLM: distributions of the next token.


@dataclass(frozen=True)
class Agreement:
    """How far the packed model's next-token distributions are from the original's.

    Attributes:
        kl: Mean Kullback-Leibler divergence from the original, nats.
        top_1: Share of positions where both find the same token likeliest.
        positions: How many were compared.
    """

    kl: float
    top_1: float
    positions: int


def agreement(original: Read, packed: Read, processor: Processor, shown: list[Sample]) -> Agreement:
    """Compare two checkpoints of one model on every token after the image, answers included."""
    divergences, same = [], []
    theirs = list(_distributions(*original(), processor, shown))
    for reference, ours in zip(theirs, _distributions(*packed(), processor, shown), strict=True):
        divergences.append(mx.sum(mx.exp(reference) * (reference - ours), axis=-1))
        same.append(mx.argmax(reference, axis=-1) == mx.argmax(ours, axis=-1))
    kl, agreeing = np.array(mx.concatenate(divergences)), np.array(mx.concatenate(same))
    return Agreement(float(kl.mean()), float(agreeing.mean()), len(kl))


def _distributions(
    config: FastVLMConfig, tensors: Tensors, processor: Processor, shown: list[Sample]
) -> Iterator[mx.array]:
    """Log-probabilities (L, V) of the tokens after each token that follows the image."""
    model = FastVLM(config)
    model.eval()
    dtype = default_dtype()
    decoder = model.language_model
    inputs = [_inputs(processor, sample) for sample in shown]
    with _part(model, tensors, ("vision_tower.", "projector."), dtype):
        features = [model.encode_image(pixels) for _, pixels, _ in inputs]
        mx.eval(features)
    tied = decoder.lm_head is None
    embedding = "language_model.embed_tokens."
    kept = {name: value for name, value in tensors.items() if tied and name.startswith(embedding)}
    with _part(model, tensors, (embedding,), None):
        states = [
            model.embed(ids, seen).astype(dtype)
            for (ids, _, _), seen in zip(inputs, features, strict=True)
        ]
        mx.eval(states)
    for i, layer in enumerate(decoder.layers):
        with _part(model, tensors, (f"language_model.layers.{i}.",), dtype):
            states = [layer(x, "causal", None) for x in states]
            mx.eval(states)
    head = embedding if tied else "language_model.lm_head."
    with _part(model, tensors | kept, ("language_model.norm.", head), None):
        for x, (_, _, start) in zip(states, inputs, strict=True):
            last = decoder.norm(x[0, start:]).astype(dtype)
            logits = _output(
                decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head, last
            )
            logits = logits[:, : processor.tokenizer.size].astype(mx.float32)
            logits -= mx.logsumexp(logits, axis=-1, keepdims=True)
            mx.eval(logits)
            yield logits


def _inputs(processor: Processor, sample: Sample) -> tuple[mx.array, mx.array, int]:
    """Ids (1, L) of question and answer, pixels, and where the text after the image begins."""
    resolution = min(RESOLUTION, processor.image_size)
    asked = processor(sample.question, [sample.image], resolution=resolution)
    ids = np.concatenate([asked.input_ids, processor.tokenizer.encode(sample.answer)])
    start = int(np.flatnonzero(ids == IMAGE_TOKEN)[-1]) + 1
    assert asked.pixels is not None
    return mx.array(ids[None]), asked.pixels, start


@contextmanager
def _part(
    model: FastVLM, tensors: Tensors, prefixes: tuple[str, ...], dtype: mx.Dtype | None
) -> Iterator[None]:
    """Give the model its weights under some prefixes, and take them away again."""
    names = [name for name in tensors if name.startswith(prefixes)]
    weights = [(name, tensors.pop(name)) for name in names]
    if dtype is not None:
        weights = [(name, as_dtype(tensor, dtype)) for name, tensor in weights]
    model.load_weights(weights, strict=False)
    del weights
    yield
    model.load_weights([(name, mx.zeros(())) for name in names], strict=False)


def _output(head: nn.Module, x: mx.array) -> mx.array:
    """Logits (L, V) of states (L, D); a float layer is used some rows at a time."""
    if isinstance(head, nn.QuantizedEmbedding):
        return head.as_linear(x)
    if isinstance(head, nn.QuantizedLinear):
        return head(x)
    weight, parts = head.weight, []
    for start in range(0, weight.shape[0], HEAD_ROWS):
        parts.append(x @ weight[start : start + HEAD_ROWS].astype(x.dtype).T)
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=-1)


# MobileCLIP: embeddings.


@dataclass(frozen=True)
class Closeness:
    """How far the packed model's embeddings are from the original's.

    Attributes:
        image: Mean cosine of the two embeddings of an image.
        text: The same of a label.
        top_1: Share of images for which both find the same label likeliest.
    """

    image: float
    text: float
    top_1: float


def closeness(
    original: Read, packed: Read, processor: ClipProcessor, shown: list[Sample]
) -> Closeness:
    """Compare two checkpoints of one MobileCLIP."""
    (images, texts), (our_images, our_texts) = (
        _embeddings(*read(), processor, shown) for read in (original, packed)
    )
    same = [mx.argmax(i @ t.T, axis=-1) for i, t in ((images, texts), (our_images, our_texts))]
    return Closeness(
        float(np.array(mx.mean(mx.sum(images * our_images, axis=-1)))),
        float(np.array(mx.mean(mx.sum(texts * our_texts, axis=-1)))),
        float(np.array(mx.mean(same[0] == same[1]))),
    )


def _embeddings(
    config: MobileCLIPConfig, tensors: Tensors, processor: ClipProcessor, shown: list[Sample]
) -> tuple[mx.array, mx.array]:
    model = MobileCLIP(config)
    model.eval()
    assign(model, tensors, default_dtype(), "the model")
    images = [
        model.encode_image(processor.images([sample.image]), normalize=True) for sample in shown
    ]
    return mx.concatenate(images), model.encode_text(processor.texts(LABELS), normalize=True)
