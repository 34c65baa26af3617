"""The layers of FastVLM that `check` compares, in order."""

import os
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mobileclip.check.bounds import Bounds
from mlx_mobileclip.check.compare import Chain, Models, Row, Step
from mlx_mobileclip.check.mobileclip import fastvit_steps
from mlx_mobileclip.check.picture import draw
from mlx_mobileclip.check.report import Report, run_check
from mlx_mobileclip.concurrency import register_thread
from mlx_mobileclip.device import parse_dtype

from ..defaults import DEFAULT_PROMPT
from ..loader import find_checkpoint, read_canonical, read_tokenizer
from ..models.fastvlm import IMAGE_TOKEN, FastVLM
from ..models.kv_cache import KVCache
from ..preprocess.processor import Inputs, Processor

EMBEDDING, HEAD = "language_model.embed_tokens", "language_model.lm_head"
NORM = "language_model.norm."
TABLES = (EMBEDDING, HEAD)
TABLE_ROWS = 1 << 14  # rows of the output layer to convert to float32 at a time
# Maximum side in pixels. In float32 on a CPU, MLX computes the depthwise convolutions of FastViTHD
# at 0.05 GMAC/s (AMD EPYC, MLX 0.32.4, 2026-11-27): 1.4 GMAC at 512 px, 5.6 at 1024.
RESOLUTION = 512


def check_fastvlm(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    quiet: bool = False,
) -> Report:
    """Compare a FastVLM on the device with float32 on the CPU, on a question about a picture.

    Args:
        model: This and the other arguments as for `load`.
        revision: Branch, tag or commit of the repository.
        dtype: dtype on the device.
        quiet: Show no progress.

    Raises:
        ModelError: the checkpoint or an argument cannot be used; mostly one of its subclasses.
    """
    register_thread()
    checkpoint = find_checkpoint(model, revision)
    read = partial(read_canonical, checkpoint)
    models = Models(FastVLM, read, parse_dtype(dtype), checkpoint.name, TABLES)
    processor = Processor(read_tokenizer(checkpoint, models.config), models.config)
    resolution = min(RESOLUTION, processor.image_size)
    inputs = processor(DEFAULT_PROMPT, [draw()], resolution=resolution)
    return run_check(
        checkpoint, models, lambda bounds: fastvlm_steps(models, inputs, bounds), quiet=quiet
    )


def fastvlm_steps(models: Models, inputs: Inputs, bounds: Bounds) -> list[Step]:
    """List the comparisons from the pixels to the most likely tokens.

    Args:
        models: FastVLM on the device, and its reference, with TABLES.
        inputs: A prompt with one image.
        bounds: Upper bounds of the rounding errors.
    """
    assert inputs.pixels is not None
    chain = Chain(models, inputs.pixels, bounds.part)
    ids = inputs.input_ids[None]
    start = int(np.flatnonzero(np.array(inputs.input_ids) == IMAGE_TOKEN)[-1]) + 1
    head = EMBEDDING if models.config.text.tie_word_embeddings else HEAD
    project = partial(
        chain.step, "projector", "", ("projector.",), lambda model, x: model.project(x)
    )
    embed = partial(
        chain.step,
        "embedding",
        "",
        (f"{EMBEDDING}.", NORM),  # the norm's dtype is that of the embeddings
        lambda model, x: model.embed(ids, x),
        partial(_embed_reference, models, ids),
    )
    return [
        *fastvit_steps(chain, "vision_tower", models.config.vision),
        project,
        embed,
        *(partial(_decoder_layer, chain, i) for i in range(models.config.text.num_hidden_layers)),
        partial(_output_layer, models, chain, start, head),
        partial(_tokens, chain, bounds.logits),
    ]


def _embed_reference(models: Models, ids: mx.array, model: FastVLM, features: mx.array) -> mx.array:
    """Embed ids with only the rows of the table that they need; IMAGE_TOKEN is negative."""
    used, indices = np.unique(np.array(ids), return_inverse=True)
    rows = used[used >= 0]
    model.language_model.embed_tokens.weight = models.rows(EMBEDDING, mx.array(rows))
    row_ids = indices.reshape(ids.shape) - (len(used) - len(rows))
    return model.embed(mx.array(np.where(np.array(ids) < 0, IMAGE_TOKEN, row_ids)), features)


def _decoder_layer(chain: Chain, index: int) -> list[Row]:
    """Compare a layer on all tokens but the last, which fill its KV cache, and on the last."""

    def layer(model: FastVLM) -> Any:
        return model.language_model.layers[index]

    def with_cache(model: FastVLM, x: mx.array) -> mx.array:
        cache, prompt = KVCache(x.shape[1]), x.shape[1] - 1
        first = layer(model)(x[:, :prompt], cache.make_mask(prompt), cache)
        return mx.concatenate(
            [first, layer(model)(x[:, prompt:], cache.make_mask(1), cache)], axis=1
        )

    return chain.step(
        f"decoder layer {index}",
        "",
        (f"language_model.layers.{index}.",),
        with_cache,
        lambda model, x: layer(model)(x, "causal", None),
        {"prompt": slice(None, -1), "next token": slice(-1, None)},
    )


def _output_layer(models: Models, chain: Chain, start: int, head: str) -> list[Row]:
    """Compare the logits of the positions from `start`."""

    def run(model: FastVLM, x: mx.array) -> mx.array:
        decoder = model.language_model
        x = decoder.norm(x[:, start:])
        return decoder.embed_tokens.as_linear(x) if decoder.lm_head is None else decoder.lm_head(x)

    def run_reference(model: FastVLM, x: mx.array) -> mx.array:
        x = model.language_model.norm(x[:, start:])
        size, parts = models.config.text.vocab_size, []
        for row in range(0, size, TABLE_ROWS):
            parts.append(x @ models.rows(head, slice(row, row + TABLE_ROWS)).T)
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=-1)

    models.read_again()
    return chain.step("output layer", "", (NORM, f"{head}."), run, run_reference)


def _tokens(chain: Chain, bound: float) -> list[Row]:
    """Compare the most likely token after each position.

    If they differ, the error is how far the device's token is below the best one in the reference:
    the difference of their logits, relative to the root mean square of all logits. Each of the two
    may be off by `bound`.
    """
    if chain.chained is None:
        return [Row("tokens", "", float("nan"), 2 * bound)]
    exact = np.array(chain.exact[0])
    actual = np.array(chain.chained[0].astype(mx.float32))
    picked, best = actual.argmax(-1), exact.argmax(-1)
    rows = np.arange(len(exact))
    gaps = (exact[rows, best] - exact[rows, picked]) / np.sqrt(np.mean(exact**2, axis=-1))
    error = float(np.max(gaps)) if np.isfinite(actual).all() else float("nan")
    same = f"{int(np.sum(picked == best))} of {len(rows)} the same"
    return [Row("tokens", same, error, 2 * bound)]
