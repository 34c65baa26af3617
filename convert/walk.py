"""Run a model and see what each stage makes of its inputs, also with some layers rounded.

FastVLM is run part by part, each decoder layer's weights read when their turn comes and forgotten
after it, so that a model is measured in a fraction of the memory that it would take to run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.model import IMAGE_TOKEN, FastVLM
from mlx_fastvlm.processor import Processor
from mlx_mobileclip.checkpoint import as_dtype, assign
from mlx_mobileclip.clip import MobileCLIP, MobileCLIPConfig, embedding
from mlx_mobileclip.depthwise import join
from mlx_mobileclip.device import default_dtype, on_cpu
from mlx_mobileclip.fastvit import FastViT
from mlx_mobileclip.processor import Processor as ClipProcessor
from mlx_mobileclip.quantization import Packed, Quantization
from mlx_mobileclip.text import TextTower
from mlx_mobileclip.vit import ViT

from .calibration import LABELS, Sample
from .quantize import Tensors, unpack, unpacked

RESOLUTION = 512  # px at most; more image tokens would tell little more
HEADS = {"language_model.embed_tokens", "language_model.lm_head"}
HEAD_ROWS = 1 << 14  # rows of the output layer that are turned to floats at a time
NONE = ""  # in the place of a unit: nothing was rounded
LOGITS, IMAGES, TEXTS = "logits", "image embedding", "text embedding"
Read = Callable[[], tuple[Any, Tensors]]
Units = dict[str, Packed]  # layers that are packed alike, by the module that holds them


class Seen(NamedTuple):
    """What a stage has made of one sample.

    Attributes:
        stage: Of the model.
        rounded: The unit whose weights were rounded, all others being as they are; or NONE.
        value: For LOGITS, log-probabilities (L, V) of the token after each that follows the
            image; for embeddings, unit vectors.
    """

    stage: str
    rounded: str
    value: mx.array


Walk = Callable[[Read, Units, list[Sample]], Iterator[Seen]]


@contextmanager
def rounded(model: nn.Module, packed: Packed) -> Iterator[None]:
    """Let some layers' weights be what packing leaves of them."""
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {path: modules[path] for path in packed}
    kept = {path: layer.weight for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.weight = unpack(packed[path].pack(layer.weight), packed[path], layer.weight.dtype)
    yield
    for path, layer in layers.items():
        layer.weight = kept[path]


# FastVLM.


class Prompt(NamedTuple):
    """Ids (1, L) of question and answer, pixels, and where the text after the image begins."""

    ids: mx.array
    pixels: mx.array
    start: int


def prompt(processor: Processor, sample: Sample) -> Prompt:
    """What the model is given of a sample."""
    resolution = min(RESOLUTION, processor.image_size)
    asked = processor(sample.question, [sample.image], resolution=resolution)
    ids = np.concatenate([asked.input_ids, processor.tokenizer.encode(sample.answer)])
    start = int(np.flatnonzero(ids == IMAGE_TOKEN)[-1]) + 1
    assert asked.pixels is not None
    return Prompt(mx.array(ids[None]), asked.pixels, start)


def walk_fastvlm(
    read: Read, units: Units, samples: list[Sample], processor: Processor
) -> Iterator[Seen]:
    """Every stage of FastVLM, and from the first that rounding a unit changes also with that."""
    config, tensors = read()
    assert isinstance(config, FastVLMConfig)
    if on_cpu():  # which multiplies by packed weights one number at a time
        packed = config.quantization
        heads = {path: packed[path] for path in packed.keys() & HEADS}
        tensors = unpacked(tensors, {path: packed[path] for path in packed.keys() - HEADS})
        config = replace(config, quantization=heads)
    model = FastVLM(config)
    model.eval()
    decoder, dtype = model.language_model, default_dtype()
    prompts = [prompt(processor, sample) for sample in samples]
    with _part(model, tensors, ("vision_tower.", "projector."), dtype):
        features: dict[str, list[mx.array]] = {NONE: []}
        for each in prompts:
            for stage, x in _tower(model.vision_tower, each.pixels):
                yield Seen(stage, NONE, x)
            features[NONE].append(model.project(x))
            yield Seen("projector", NONE, features[NONE][-1])
        for unit in _starting(units, ("vision_tower", "projector")):
            with rounded(model, units[unit]):
                features[unit] = [model.encode_image(each.pixels) for each in prompts]
                mx.eval(features[unit])
            yield from (Seen("projector", unit, x) for x in features[unit])

    def embed(unit: str) -> list[mx.array]:
        found = [
            model.embed(each.ids, seen).astype(dtype)
            for each, seen in zip(prompts, features[unit], strict=True)
        ]
        mx.eval(found)
        return found

    head_units = [unit for unit in units if unit == "language_model"]
    tied = decoder.lm_head is None
    embedding = "language_model.embed_tokens."
    kept = {name: value for name, value in tensors.items() if tied and name.startswith(embedding)}
    with _part(model, tensors, (embedding,), None):
        states = {unit: embed(unit) for unit in features}
        for unit in head_units:
            here = {path: how for path, how in units[unit].items() if f"{path}." == embedding}
            with rounded(model, here):
                features[unit] = features[NONE]
                states[unit] = embed(unit)
            yield from (Seen("embedding", unit, x) for x in states[unit])
    for i, layer in enumerate(decoder.layers):
        path = f"language_model.layers.{i}."
        with _part(model, tensors, (path,), dtype):
            before = states[NONE]
            for unit in states:
                states[unit] = [layer(x, "causal", None) for x in states[unit]]
                mx.eval(states[unit])
            for unit in _starting(units, (path,)):
                with rounded(model, units[unit]):
                    states[unit] = [layer(x, "causal", None) for x in before]
                    mx.eval(states[unit])
        for unit, values in states.items():
            yield from (Seen(f"decoder layer {i}", unit, x) for x in values)
    head = embedding if tied else "language_model.lm_head."
    output: Any = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    packing = config.quantization.get(head.removesuffix("."))
    size = processor.tokenizer.size
    with _part(model, tensors | kept, ("language_model.norm.", head), None):
        for i, each in enumerate(prompts):
            for unit in states:
                here = {p: how for p, how in units.get(unit, {}).items() if f"{p}." == head}
                with rounded(model, here):
                    last = decoder.norm(states[unit][i][0, each.start :]).astype(dtype)
                    logits = _output(output, packing, last)[:, :size].astype(mx.float32)
                    logits -= mx.logsumexp(logits, axis=-1, keepdims=True)
                    mx.eval(logits)
                yield Seen(LOGITS, unit, logits)


def _tower(tower: FastViT, pixels: mx.array) -> Iterator[tuple[str, mx.array]]:
    """Each stage's name and output, the last being the tower's."""
    x = tower.stem([pixels.astype(tower.stem.conv.weight.dtype)])
    yield "stem", join(x)
    for i, stage in enumerate(tower.stages):
        x = stage(x)
        yield f"stage {i}", join(x)
    yield "final convolution", join(tower.final_conv(x))


def _starting(units: Units, prefixes: tuple[str, ...]) -> list[str]:
    return [unit for unit in units if unit.startswith(prefixes)]


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


def _output(head: nn.Module, packing: Quantization | None, x: mx.array) -> mx.array:
    """Logits (L, V) of states (L, D); the layer is turned to floats some rows at a time."""
    parts = []
    for start in range(0, len(head.weight), HEAD_ROWS):
        rows = {name: value[start : start + HEAD_ROWS] for name, value in head.parameters().items()}
        weight = rows["weight"] if packing is None else unpack(rows, packing, x.dtype)
        parts.append(x @ weight.astype(x.dtype).T)
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=-1)


# MobileCLIP.


def walk_mobileclip(
    read: Read, units: Units, samples: list[Sample], processor: ClipProcessor
) -> Iterator[Seen]:
    """Every stage of both towers, and their embeddings with each unit rounded as well."""
    config, tensors = read()
    assert isinstance(config, MobileCLIPConfig)
    model = MobileCLIP(config)
    model.eval()
    assign(model, tensors, default_dtype(), "the model")
    trunk, text = model.image.trunk, model.text
    pixels = [processor.images([sample.image]) for sample in samples]
    labels = None if text is None else processor.texts(LABELS)
    for each in pixels:
        stages = _vit(trunk, each) if isinstance(trunk, ViT) else _tower(trunk, each)
        for stage, x in stages:
            yield Seen(stage, NONE, x)
        yield Seen(IMAGES, NONE, embedding(model.image.project(x), normalize=True))
    if text is not None and labels is not None:
        for stage, x in _text(text, labels):
            yield Seen(stage, NONE, x)
        yield Seen(TEXTS, NONE, embedding(text.pool(x, labels), normalize=True))
    for unit, layers in units.items():
        with rounded(model, layers):
            for each in pixels:
                yield Seen(IMAGES, unit, model.encode_image(each, normalize=True))
            if labels is not None:
                yield Seen(TEXTS, unit, model.encode_text(labels, normalize=True))


def _vit(tower: ViT, pixels: mx.array) -> Iterator[tuple[str, mx.array]]:
    """Each layer's name and output, the last being the tower's."""
    x = tower.embed(pixels)
    yield "patches", x
    for i, layer in enumerate(tower.layers):
        x = layer(x)
        yield f"image layer {i}", x
    yield "class token", tower.pool(x)


def _text(tower: TextTower, ids: mx.array) -> Iterator[tuple[str, mx.array]]:
    """Each layer's name and output, the last being what is pooled."""
    x = tower.embed(ids)
    yield "tokens", x
    for i, layer in enumerate(tower.layers):
        x = layer(x, tower.causal)
        yield f"text layer {i}", x
