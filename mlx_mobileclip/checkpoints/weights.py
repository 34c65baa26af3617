"""Load weights into a model, after checking their names, shapes, types and values."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import CheckpointError, name_some

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def named_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The model's parameters by their dotted names."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def is_finite(tensor: mx.array) -> mx.array:
    """Whether all values are finite, as a lazy scalar."""
    if tensor.dtype == mx.float32:  # the sum is finite if all values are; no temporary array
        return mx.isfinite(mx.sum(tensor))
    return mx.all(mx.isfinite(tensor))  # a sum could overflow


def check_fit(model: nn.Module, tensors: dict[str, mx.array], where: str) -> None:
    """Compare names, shapes and types of lazy tensors with the parameters of a model.

    Raises:
        CheckpointError: names every tensor that is missing, left over or misshapen.
    """
    expected = named_parameters(model)
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing {name_some(missing)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        problems.append(f"no place for {name_some(extra)}")
    for name in sorted(expected.keys() & tensors.keys()):
        parameter, tensor = expected[name], tensors[name]
        quantized = parameter.dtype not in FLOATS
        same_dtype = parameter.dtype == tensor.dtype
        if parameter.shape != tensor.shape:
            problems.append(f"{name} has shape {tensor.shape} instead of {parameter.shape}")
        elif quantized != (tensor.dtype not in FLOATS) or (quantized and not same_dtype):
            problems.append(f"{name} is {tensor.dtype} instead of {parameter.dtype}")
    if problems:
        raise CheckpointError(f"{where}: {name_some(problems)}; its tensors do not fit its config")


def as_dtype(tensor: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast a float tensor; a quantised one is returned unchanged."""
    if tensor.dtype not in FLOATS:
        return tensor
    # Scalars, such as logit_scale, stay exact.
    return tensor.astype(dtype if tensor.ndim else mx.float32)


def not_finite(
    names: list[str], dtype: mx.Dtype, where: str, *, damaged: bool = False
) -> CheckpointError:
    """The error for values that are not finite, in the source (`damaged`) or after the cast."""
    wider = "" if damaged or dtype == mx.float32 else "try --dtype float32, or "
    return CheckpointError(
        f"{where}: not finite in {str(dtype).split('.')[-1]}: {name_some(names)}; "
        f"{wider}download the checkpoint again"
    )


def assign(model: nn.Module, tensors: dict[str, mx.array], dtype: mx.Dtype, where: str) -> None:
    """Load weights into a model: names and shapes must match exactly, values must be finite.

    Float tensors are cast to `dtype`. The weights are evaluated, so that other threads can use the
    model. `tensors` is emptied, so that the memory of each source tensor is freed after its cast.

    Raises:
        CheckpointError: names every tensor that is missing, left over, misshapen or not finite.
    """
    check_fit(model, tensors, where)
    weights = [(name, as_dtype(row_major(tensors.pop(name)), dtype)) for name in list(tensors)]
    model.load_weights(weights, strict=True)
    finite = {name: is_finite(value) for name, value in weights if value.dtype in FLOATS}
    try:
        mx.eval(model.parameters(), finite)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: the weights cannot be read ({error})") from error
    if bad := sorted(name for name, ok in finite.items() if not ok.item()):
        values = dict(weights)
        # A cast can overflow to infinity, but never gives NaN.
        damaged = any(mx.any(mx.isnan(values[name])).item() for name in bad)
        raise not_finite(bad, dtype, where, damaged=damaged)


def row_major(tensor: mx.array) -> mx.array:
    """Give an array the strides of its shape in row-major order.

    Transposing PyTorch's depthwise kernels (C, 1, k, k) keeps that order in memory, but leaves the
    last axis a stride of k * k, with which cuDNN chooses a convolution that takes 5 to 17 times as
    long (H200, MLX 0.32.4, 2026-11-26).
    """
    return tensor.reshape(-1).reshape(tensor.shape)
