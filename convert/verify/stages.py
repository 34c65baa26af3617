"""Run a model stage by stage and yield each stage's output, also with some layers rounded.

FastVLM is run in parts. The weights of each decoder layer are loaded when it is run and then
released, so that measuring a model takes a fraction of the memory of running it.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fastvlm.models.config import FastVLMConfig
from mlx_fastvlm.models.fastvlm import IMAGE_TOKEN, FastVLM
from mlx_fastvlm.preprocess.processor import Processor
from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.checkpoints.weights import as_dtype, assign
from mlx_mobileclip.device import parse_dtype
from mlx_mobileclip.layers import whole
from mlx_mobileclip.models.clip import MobileCLIP, MobileCLIPConfig, embedding
from mlx_mobileclip.models.fastvit import FastViT
from mlx_mobileclip.models.text import TextTower
from mlx_mobileclip.models.vit import ViT
from mlx_mobileclip.preprocess.processor import Processor as ClipProcessor
from mlx_mobileclip.quantization import Quantization, QuantizedLayers, dequantize

from ..calibration import LABELS, Sample

RESOLUTION = 512  # maximum, in px; more image tokens would add time and little information
HEAD_ROWS = 1 << 14  # rows of the output layer to dequantise at a time
UNROUNDED = ""  # stands for a unit if no weights are rounded
HEAD_UNIT = "language_model"  # the unit of the embedding and the output layer
LOGITS, IMAGES, TEXTS = "logits", "image embedding", "text embedding"
Read = Callable[[], tuple[Any, Tensors]]  # reads a checkpoint: config and canonical tensors
Units = dict[str, QuantizedLayers]  # layers that are rounded together, by their module


class StageOutput(NamedTuple):
    """The output of a stage of a model for one sample.

    Attributes:
        stage: Name of the stage.
        rounded: The only unit whose weights were rounded, or UNROUNDED.
        value: For LOGITS, log-probabilities (L, V) of the token after each token that follows the
            image; for IMAGES and TEXTS, unit vectors (N, D).
    """

    stage: str
    rounded: str
    value: mx.array


RunStages = Callable[[Read, Units, list[Sample]], Iterator[StageOutput]]


@contextmanager
def rounded(model: nn.Module, quantized: QuantizedLayers) -> Iterator[None]:
    """Quantise and dequantise the weights of some layers, within the block."""
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {path: modules[path] for path in quantized}
    exact = {path: layer.weight for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.weight = dequantize(
            quantized[path].quantize(layer.weight), quantized[path], layer.weight.dtype
        )
    yield
    for path, layer in layers.items():
        layer.weight = exact[path]


# FastVLM.


class Prompt(NamedTuple):
    """A sample as model input.

    Attributes:
        ids: Token ids (1, L) of question and answer.
        pixels: The image, (1, H, W, 3).
        start: Index of the first token after the image.
    """

    ids: mx.array
    pixels: mx.array
    start: int


def make_prompt(processor: Processor, sample: Sample) -> Prompt:
    """Convert a sample to model input, at RESOLUTION at most."""
    resolution = min(RESOLUTION, processor.image_size)
    inputs = processor(sample.question, [sample.image], resolution=resolution)
    ids = np.concatenate([inputs.input_ids, processor.tokenizer.encode(sample.answer)])
    start = int(np.flatnonzero(ids == IMAGE_TOKEN)[-1]) + 1
    assert inputs.pixels is not None
    return Prompt(mx.array(ids[None]), inputs.pixels, start)


def run_fastvlm(
    read: Read, units: Units, samples: list[Sample], processor: Processor
) -> Iterator[StageOutput]:
    """Run a FastVLM; a rounded unit has outputs from the first stage that it affects.

    Args:
        read: Reads the checkpoint.
        units: Layers to round, one unit at a time.
        samples: Images, each with a question and an answer.
        processor: Processor of the checkpoint.

    Yields:
        Outputs stage by stage, of each sample and unit. Those of hidden layers are (1, L, D).
    """
    run = _FastVLMRun(read, units, [make_prompt(processor, sample) for sample in samples])
    features = yield from run.image_features()
    states = yield from run.embeddings(features)
    yield from run.decoder_layers(states)
    yield from run.logits(states, processor.tokenizer.size)


States = dict[str, list[mx.array]]  # by unit that was rounded, then by prompt


class _FastVLMRun:
    """A FastVLM whose parts have weights only while they are run."""

    def __init__(self, read: Read, units: Units, prompts: list[Prompt]):
        self.config, self.tensors = read()
        assert isinstance(self.config, FastVLMConfig)
        self.model = FastVLM(self.config)
        self.model.eval()
        self.units, self.prompts = units, prompts
        self.dtype = parse_dtype(None)  # of the computation
        self.tied = self.model.language_model.lm_head is None

    def image_features(self) -> Generator[StageOutput, None, States]:
        """Run image tower and projector; returns the image features."""
        features: States = {UNROUNDED: []}
        with self._weights(("vision_tower.", "projector."), self.dtype):
            for each in self.prompts:
                for stage, x in _run_fastvit(self.model.vision_tower, each.pixels):
                    yield StageOutput(stage, UNROUNDED, x)
                features[UNROUNDED].append(self.model.project(x))
                yield StageOutput("projector", UNROUNDED, features[UNROUNDED][-1])
            for unit in self._units_in("vision_tower", "projector"):
                with rounded(self.model, self.units[unit]):
                    features[unit] = [self.model.encode_image(p.pixels) for p in self.prompts]
                    mx.eval(features[unit])
                yield from (StageOutput("projector", unit, x) for x in features[unit])
        return features

    def embeddings(self, features: States) -> Generator[StageOutput, None, States]:
        """Embed tokens and image features; returns the states before the first layer."""
        embedding = "language_model.embed_tokens."
        # Tied weights are needed again for the logits.
        saved = {k: v for k, v in self.tensors.items() if self.tied and k.startswith(embedding)}
        with self._weights((embedding,), None):
            states = {unit: self._embed(images) for unit, images in features.items()}
            for unit in self.units.keys() & {HEAD_UNIT}:
                with rounded(self.model, self._layers(unit, embedding)):
                    states[unit] = self._embed(features[UNROUNDED])
                yield from (StageOutput("embedding", unit, x) for x in states[unit])
        self.tensors |= saved
        return states

    def decoder_layers(self, states: States) -> Iterator[StageOutput]:
        """Run the decoder's layers; updates the states and adds those of the layers' units."""
        for i, layer in enumerate(self.model.language_model.layers):
            path = f"language_model.layers.{i}."
            with self._weights((path,), self.dtype):
                inputs = states[UNROUNDED]
                for unit in states:
                    states[unit] = [layer(x, "causal", None) for x in states[unit]]
                    mx.eval(states[unit])
                for unit in self._units_in(path):
                    with rounded(self.model, self.units[unit]):
                        states[unit] = [layer(x, "causal", None) for x in inputs]
                        mx.eval(states[unit])
            for unit, values in states.items():
                yield from (StageOutput(f"decoder layer {i}", unit, x) for x in values)

    def logits(self, states: States, vocab_size: int) -> Iterator[StageOutput]:
        """Run the output layer on the positions after the image."""
        decoder = self.model.language_model
        head = "language_model.embed_tokens." if self.tied else "language_model.lm_head."
        layer: Any = decoder.embed_tokens if self.tied else decoder.lm_head
        quantization = self.config.quantization.get(head.removesuffix("."))
        with self._weights(("language_model.norm.", head), None):
            for i, each in enumerate(self.prompts):
                for unit in states:
                    with rounded(self.model, self._layers(unit, head)):
                        x = decoder.norm(states[unit][i][0, each.start :]).astype(self.dtype)
                        logits = _run_head(layer, quantization, x)[:, :vocab_size].astype(
                            mx.float32
                        )
                        logits -= mx.logsumexp(logits, axis=-1, keepdims=True)
                        mx.eval(logits)
                    yield StageOutput(LOGITS, unit, logits)

    def _embed(self, features: list[mx.array]) -> list[mx.array]:
        pairs = zip(self.prompts, features, strict=True)
        states = [self.model.embed(each.ids, image).astype(self.dtype) for each, image in pairs]
        mx.eval(states)
        return states

    def _units_in(self, *prefixes: str) -> list[str]:
        return [unit for unit in self.units if unit.startswith(prefixes)]

    def _layers(self, unit: str, prefix: str) -> QuantizedLayers:
        """The layers of a unit under a prefix."""
        layers = self.units.get(unit, {})
        return {path: entry for path, entry in layers.items() if f"{path}.".startswith(prefix)}

    @contextmanager
    def _weights(self, prefixes: tuple[str, ...], dtype: mx.Dtype | None) -> Iterator[None]:
        """Load the weights under some prefixes, cast to a dtype, and release them afterwards."""
        names = [name for name in self.tensors if name.startswith(prefixes)]
        weights = [(name, self.tensors.pop(name)) for name in names]
        if dtype is not None:
            weights = [(name, as_dtype(tensor, dtype)) for name, tensor in weights]
        self.model.load_weights(weights, strict=False)
        del weights
        yield
        self.model.load_weights([(name, mx.zeros(())) for name in names], strict=False)


def _run_fastvit(tower: FastViT, pixels: mx.array) -> Iterator[tuple[str, mx.array]]:
    """Name and output of each stage; the last is the tower's output."""
    x = tower.stem(pixels.astype(tower.stem.conv.weight.dtype))
    yield "stem", whole(x)
    for i, stage in enumerate(tower.stages):
        x = stage(x)
        yield f"stage {i}", whole(x)
    yield "final convolution", tower.final_conv(x)


def _run_head(head: nn.Module, quantization: Quantization | None, x: mx.array) -> mx.array:
    """Logits (L, V) of states (L, D), dequantising HEAD_ROWS rows of the layer at a time."""
    parts = []
    for start in range(0, len(head.weight), HEAD_ROWS):
        rows = {name: value[start : start + HEAD_ROWS] for name, value in head.parameters().items()}
        weight = rows["weight"] if quantization is None else dequantize(rows, quantization, x.dtype)
        parts.append(x @ weight.astype(x.dtype).T)
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=-1)


# MobileCLIP.


def run_mobileclip(
    read: Read, units: Units, samples: list[Sample], processor: ClipProcessor
) -> Iterator[StageOutput]:
    """Run both towers of a MobileCLIP, on the samples' images and on LABELS.

    Args:
        read: Reads the checkpoint.
        units: Layers to round, one unit at a time.
        samples: Calibration samples; only their images are used.
        processor: Processor of the checkpoint.

    Yields:
        Outputs of every stage with exact weights, then the embeddings with each unit rounded.
    """
    config, tensors = read()
    assert isinstance(config, MobileCLIPConfig)
    model = MobileCLIP(config)
    model.eval()
    assign(model, tensors, parse_dtype(None), "the model")
    trunk, text = model.image.trunk, model.text
    pixels = [processor.images([sample.image]) for sample in samples]
    labels = None if text is None else processor.texts(LABELS)
    for each in pixels:
        stages = _run_vit(trunk, each) if isinstance(trunk, ViT) else _run_fastvit(trunk, each)
        for stage, x in stages:
            yield StageOutput(stage, UNROUNDED, x)
        yield StageOutput(IMAGES, UNROUNDED, embedding(model.image.project(x), normalize=True))
    if text is not None and labels is not None:
        for stage, x in _run_text(text, labels):
            yield StageOutput(stage, UNROUNDED, x)
        yield StageOutput(TEXTS, UNROUNDED, embedding(text.pool(x, labels), normalize=True))
    for unit, layers in units.items():
        with rounded(model, layers):
            for each in pixels:
                yield StageOutput(IMAGES, unit, model.encode_image(each, normalize=True))
            if labels is not None:
                yield StageOutput(TEXTS, unit, model.encode_text(labels, normalize=True))


def _run_vit(tower: ViT, pixels: mx.array) -> Iterator[tuple[str, mx.array]]:
    """Name and output of each layer; the last is the tower's output."""
    x = tower.embed(pixels)
    yield "patches", x
    for i, layer in enumerate(tower.layers):
        x = layer(x)
        yield f"image layer {i}", x
    yield "class token", tower.pool(x)


def _run_text(tower: TextTower, ids: mx.array) -> Iterator[tuple[str, mx.array]]:
    """Name and output of each layer; the last is pooled."""
    x = tower.embed(ids)
    yield "tokens", x
    for i, layer in enumerate(tower.layers):
        x = layer(x, tower.causal)
        yield f"text layer {i}", x
