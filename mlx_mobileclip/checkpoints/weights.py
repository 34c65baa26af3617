"""Give a model its weights, once their names, shapes, types and values have been checked."""

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
    """Whether all values are, as a lazy scalar."""
    if tensor.dtype == mx.float32:  # the sum is finite unless a value is not; no temporary array
        return mx.isfinite(mx.sum(tensor))
    return mx.all(mx.isfinite(tensor))  # a sum could overflow, and a float32 copy is twice as large


def check_fit(model: nn.Module, tensors: dict[str, mx.array], where: str) -> None:
    """Compare names, shapes and kinds of lazy tensors with what a model takes.

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
        want, have = expected[name], tensors[name]
        quantized = want.dtype not in FLOATS
        if want.shape != have.shape:
            problems.append(f"{name} has shape {have.shape} instead of {want.shape}")
        elif quantized != (have.dtype not in FLOATS) or (quantized and want.dtype != have.dtype):
            problems.append(f"{name} is {have.dtype} instead of {want.dtype}")
    if problems:
        raise CheckpointError(f"{where}: {name_some(problems)}; its tensors do not fit its config")


def as_dtype(tensor: mx.array, dtype: mx.Dtype) -> mx.array:
    """A float tensor in another precision; a quantised one as it is."""
    if tensor.dtype not in FLOATS:
        return tensor
    # A lone number, such as logit_scale, costs nothing to keep exact.
    return tensor.astype(dtype if tensor.ndim else mx.float32)


def not_finite(
    names: list[str], dtype: mx.Dtype, where: str, *, damaged: bool = False
) -> CheckpointError:
    """The error for values that are not, or that do not fit the precision unless `damaged`."""
    wider = "" if damaged or dtype == mx.float32 else "try --dtype float32, or "
    return CheckpointError(
        f"{where}: not finite in {str(dtype).split('.')[-1]}: {name_some(names)}; "
        f"{wider}download the checkpoint again"
    )


def assign(model: nn.Module, tensors: dict[str, mx.array], dtype: mx.Dtype, where: str) -> None:
    """Give the model its weights: names and shapes must match exactly, values must be finite.

    Float tensors are cast to `dtype`, quantised ones are kept. The weights are evaluated here, so
    that another thread can use the model. `tensors` is emptied on the way, so that a source
    tensor's memory is free as soon as its cast is done.

    Raises:
        CheckpointError: names every tensor that is missing, left over, misshapen or not finite.
    """
    check_fit(model, tensors, where)
    weights = [(name, as_dtype(_in_order(tensors.pop(name)), dtype)) for name in list(tensors)]
    model.load_weights(weights, strict=True)
    finite = {name: is_finite(value) for name, value in weights if value.dtype in FLOATS}
    try:
        mx.eval(model.parameters(), finite)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: the weights cannot be read ({error})") from error
    if bad := sorted(name for name, ok in finite.items() if not ok.item()):
        values = dict(weights)
        damaged = any(mx.any(mx.isnan(values[name])).item() for name in bad)  # no cast makes these
        raise not_finite(bad, dtype, where, damaged=damaged)


def _in_order(tensor: mx.array) -> mx.array:
    """The same, row by row in memory, with the strides that go with it.

    PyTorch's depthwise kernels (C, 1, k, k) lie so too with the second axis put last, but that
    axis keeps a stride of k * k, and with it cuDNN chooses a convolution that takes 5 to 17 times
    as long (H200, MLX 0.32.4, 2026-11-26).
    """
    return tensor.reshape(-1).reshape(tensor.shape)
