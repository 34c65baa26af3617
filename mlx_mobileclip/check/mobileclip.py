"""The layers of MobileCLIP that `check` compares, in order."""

import os
from functools import partial

import mlx.core as mx

from ..checkpoints.hub import resolve_file
from ..concurrency import register_thread
from ..device import parse_dtype
from ..loader import read_canonical, read_tokenizer
from ..models.clip import MobileCLIP, MobileCLIPConfig, PreprocessConfig
from ..models.fastvit import FastViTConfig
from ..models.vit import ViTConfig
from ..preprocess.processor import Processor
from .compare import Chain, Models, Step
from .picture import draw
from .report import Report, run_check

TEXTS = ("a red circle", "a photo of a blue square on a table", "yellow")
TRUNK = "image.trunk"


def check_mobileclip(
    model: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    preprocess: PreprocessConfig | None = None,
    config: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Report:
    """Compare a MobileCLIP on the device with float32 on the CPU, on a picture and three texts.

    Args:
        model: This and the other arguments as for `load`.
        variant: Published model with the architecture of the checkpoint.
        revision: Branch, tag or commit of the repository.
        dtype: dtype on the device.
        preprocess: Image preprocessing.
        config: JSON file that describes the checkpoint.
        quiet: Show no progress.

    Raises:
        ModelError: the checkpoint or an argument cannot be used; mostly one of its subclasses.
    """
    register_thread()
    checkpoint = resolve_file(model, revision)
    read = partial(read_canonical, checkpoint, variant, preprocess, config)
    models = Models(MobileCLIP, read, parse_dtype(dtype), checkpoint.name)
    processor = Processor(models.config.preprocess, read_tokenizer(checkpoint, models.config))
    pixels = processor.images([draw()])
    ids = mx.zeros((0,)) if models.config.text is None else processor.texts(TEXTS)
    return run_check(
        checkpoint,
        models,
        lambda bounds: mobileclip_steps(models, pixels, ids, bounds.part),
        quiet=quiet,
    )


def mobileclip_steps(models: Models, pixels: mx.array, ids: mx.array, bound: float) -> list[Step]:
    """List the comparisons of both towers.

    Args:
        models: MobileCLIP on the device, and its reference.
        pixels: (1, S, S, 3), from `Processor.images`.
        ids: (N, L), from `Processor.texts`; not used without a text tower.
        bound: Upper bound of the rounding error.
    """
    config: MobileCLIPConfig = models.config
    image = Chain(models, pixels, bound)
    steps = (
        _vit_steps(image, config.image)
        if isinstance(config.image, ViTConfig)
        else fastvit_steps(image, TRUNK, config.image)
    )
    project = partial(
        image.step, "image projection", "", ("image.projection.",), lambda m, x: m.image.project(x)
    )
    steps.append(project)
    return steps if config.text is None else steps + _text_steps(models, ids, bound)


def fastvit_steps(chain: Chain, path: str, config: FastViTConfig) -> list[Step]:
    """List the comparisons of a FastViT at a path of the model: stem, stages, final convolution."""
    steps: list[Step] = [partial(chain.layer, "stem", "", f"{path}.stem")]
    for i, blocks in enumerate(config.layers):
        stage = partial(chain.layer, f"stage {i}")
        where = f"{path}.stages.{i}"
        if i:
            steps.append(partial(stage, "downsampling", f"{where}.downsample"))
        if config.token_mixers[i] == "attention":
            steps.append(partial(stage, "positions", f"{where}.pos_emb"))
        steps += [partial(stage, f"block {j}", f"{where}.blocks.{j}") for j in range(blocks)]
    steps.append(partial(chain.layer, "final convolution", "", f"{path}.final_conv"))
    return steps


def _vit_steps(chain: Chain, config: ViTConfig) -> list[Step]:
    first = tuple(f"{TRUNK}.{name}" for name in ("stem.", "class_token", "positions", "norm_pre."))
    return [
        partial(chain.step, "patches", "", first, lambda m, x: m.image.trunk.embed(x)),
        *(
            partial(chain.layer, f"image layer {i}", "", f"{TRUNK}.layers.{i}")
            for i in range(config.layers)
        ),
        partial(
            chain.step, "class token", "", (f"{TRUNK}.norm.",), lambda m, x: m.image.trunk.pool(x)
        ),
    ]


def _text_steps(models: Models, ids: mx.array, bound: float) -> list[Step]:
    text, chain = models.config.text, Chain(models, ids, bound)
    layers = len(models.device.text.layers)
    first, last = ("text.embedding.", "text.positions"), ("text.norm.", "text.projection.")
    return [
        partial(chain.step, "text embedding", "", first, lambda m, x: m.text.embed(x)),
        *(
            partial(chain.layer, f"text layer {i}", "", f"text.layers.{i}", causal=text.causal)
            for i in range(layers)
        ),
        partial(chain.step, "text projection", "", last, lambda m, x: m.text.pool(x, ids)),
    ]
