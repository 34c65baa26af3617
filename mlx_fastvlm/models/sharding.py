"""Divide the decoder among processes: tensor parallelism (arXiv:1909.08053) by mlx.distributed.

Each rank has some of the heads of every attention and some of the columns of every SwiGLU. Ranks
add up their outputs twice in each layer, after `o_proj` and `down_proj`. Embeddings, norms, output
layer, projector and image tower are whole on every rank.
"""

import os
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import shard_linear

from mlx_mobileclip import __version__
from mlx_mobileclip.caching.fingerprint import fingerprint
from mlx_mobileclip.checkpoints.weights import check_fit, named_parameters
from mlx_mobileclip.errors import CheckpointError, ConfigError, ModelError

from .config import FastVLMConfig
from .fastvlm import FastVLM

Group = mx.distributed.Group


def join() -> Group | None:
    """Connect to the other processes of mlx.launch; None if this one was started without it.

    Raises:
        ModelError: there is only one, or no connection.
    """
    if "MLX_RANK" not in os.environ:
        return None
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the processes of mlx.launch cannot connect ({reason[:200]}); start at least two, and "
            "try another --starting-port"
        ) from error
    return group if group.size() > 1 else None


def check_ranks(config: FastVLMConfig, ranks: int) -> None:
    """Check that the decoder can be divided.

    Raises:
        ConfigError: it cannot; names the numbers of ranks that can have equal parts.
    """
    if _divides(config, ranks):
        return
    heads, kv_heads = config.text.num_attention_heads, config.text.num_key_value_heads
    possible = [str(n) for n in range(2, kv_heads + 1) if _divides(config, n)]
    sizes = sorted({layer.group_size for layer in _quantized(config)})
    groups = f", quantised in groups of {', '.join(map(str, sizes))}" if sizes else ""
    advice = (
        f"start {' or '.join(possible)} with mlx.launch"
        if possible
        else "run it in one process, without mlx.launch"
    )
    raise ConfigError(
        f"a decoder of {heads} heads with {kv_heads} for keys and values{groups} cannot be "
        f"divided among {ranks} processes; {advice}"
    )


def _quantized(config: FastVLMConfig) -> list[Any]:
    """Quantisation of the layers whose inputs are divided."""
    ends = ("self_attn.o_proj", "mlp.down_proj")
    return [how for path, how in config.quantization.items() if path.endswith(ends)]


def _divides(config: FastVLMConfig, ranks: int) -> bool:
    text = config.text
    widths = (text.hidden_size, text.intermediate_size)
    groups = {layer.group_size for layer in _quantized(config)}
    divided = (text.num_attention_heads, text.num_key_value_heads, *widths)
    return not any(n % ranks for n in divided) and not any(
        width % (ranks * size) for width in widths for size in groups
    )


def shard(
    model: FastVLM, tensors: dict[str, mx.array], group: Group, where: str
) -> dict[str, mx.array]:
    """Reduce a model that has no weights yet, and its tensors, to what this rank holds.

    Weights are read and cut one after another, so that only one is ever held whole.

    Args:
        model: Changed in place.
        tensors: Lazy tensors of the whole model; emptied.
        group: The processes that share the decoder.
        where: Name of the checkpoint, for errors.

    Returns:
        The tensors of this rank, by the same names.

    Raises:
        ConfigError: the decoder cannot be divided among this many processes.
        CheckpointError: the tensors do not fit the config, or cannot be read.
    """
    check_ranks(model.config, group.size())
    check_fit(model, tensors, where)
    model.load_weights(list(tensors.items()))
    tensors.clear()
    try:
        for layer in model.language_model.layers:
            _shard_layer(layer, group)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: the weights cannot be read ({error})") from error
    model._group = group
    return named_parameters(model)


def _shard_layer(layer: Any, group: Group) -> None:
    """Replace the linear layers of a decoder layer by this rank's part of them."""

    def part(linear: Any, sharding: str, segments: int | list[int] = 1) -> nn.Module:
        result = shard_linear(linear, sharding, segments=segments, group=group)
        mx.eval(result.parameters())
        return result

    attention, mlp = layer.self_attn, layer.mlp
    heads, kv_heads = attention._heads, attention._kv_heads
    head_dim = attention.qkv_proj.weight.shape[0] // (heads + 2 * kv_heads)
    ends = [heads * head_dim, (heads + kv_heads) * head_dim]  # of queries and keys
    attention.qkv_proj = part(attention.qkv_proj, "all-to-sharded", ends)
    attention.o_proj = part(attention.o_proj, "sharded-to-all")
    attention._heads, attention._kv_heads = heads // group.size(), kv_heads // group.size()
    mlp.gate_up_proj = part(mlp.gate_up_proj, "all-to-sharded", 2)
    mlp.down_proj = part(mlp.down_proj, "sharded-to-all")


def from_first_rank(x: mx.array, group: Group | None) -> mx.array:
    """Rank 0's value of x on every rank; x itself if there is no group.

    Args:
        x: Any shape and an integer or float dtype, the same on all ranks.
        group: The processes, or None.
    """
    if group is None:
        return x
    if group.rank():
        # Zeros alone would not depend on x, and the exchanges that lead to x would be left out.
        x = mx.depends([mx.zeros_like(x)], [x])[0]
    return mx.distributed.all_sum(x, group=group)


def bytes_from_first_rank(data: bytes | None, group: Group) -> bytes | None:
    """Rank 0's bytes, or its None, on every rank; what other ranks give is ignored."""
    size = -1 if data is None else len(data)
    size = cast(int, from_first_rank(mx.array(size, mx.int32), group).item())
    if size <= 0:
        return b"" if size == 0 else None
    first = group.rank() == 0 and data is not None
    mine = np.frombuffer(data, np.uint8) if first and data else np.zeros(size, np.uint8)
    return np.asarray(from_first_rank(mx.array(mine), group)).tobytes()


def check_same_model(model: FastVLM, group: Group, where: str) -> None:
    """Check that all ranks have loaded the same model with the same version of this package.

    Raises:
        CheckpointError: on ranks that have another than rank 0.
    """
    mlx_version = mx.__version__  # type: ignore[attr-defined]
    settings = (__version__, mlx_version, model.config.to_json())
    mine = fingerprint(model.language_model.norm, *settings).encode()
    if mine != bytes_from_first_rank(mine, group):
        raise CheckpointError(
            f"{where}: other weights, dtype or versions than on rank 0; install the same versions "
            "of this package and MLX, and use the same files"
        )


def finish(group: Group) -> None:
    """Wait until all ranks have done their work, so that none closes a connection still in use."""
    mx.eval(from_first_rank(mx.array(0, mx.int32), group))
