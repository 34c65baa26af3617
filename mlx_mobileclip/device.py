"""MLX's default device, and the dtype to use on it."""

import mlx.core as mx

from .errors import ConfigError

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def on_cpu() -> bool:
    """Whether the default device is the CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def on_metal() -> bool:
    """Whether the default device is an Apple GPU."""
    return not on_cpu() and mx.metal.is_available()


def backend() -> str:
    """Backend of the default device: "cpu", "metal" or "cuda"."""
    return "cpu" if on_cpu() else "metal" if on_metal() else "cuda"


def memory_bytes() -> int | None:
    """Memory of the default device in bytes, shared with the host on a Mac; None if unknown."""
    info = mx.device_info()
    return int(info.get("memory_size") or info.get("total_memory") or 0) or None


def reserves_memory() -> bool:
    """Whether to allocate buffers for all that may come; on a GPU, larger ones are slower."""
    return on_cpu()


def default_dtype() -> mx.Dtype:
    """float16 on a GPU; float32 on a CPU, where half precision is slow."""
    return mx.float32 if on_cpu() else mx.float16


def dtype_name(dtype: mx.Dtype) -> str:
    """Name of a dtype as users write it, such as float16."""
    return str(dtype).removeprefix("mlx.core.")


def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype:
    """Return the dtype of this name, or the default of the device for None.

    Raises:
        ConfigError: there is no such dtype.
    """
    if dtype is None:
        return default_dtype()
    parsed = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, mx.Dtype) or parsed not in DTYPES.values():
        shown = repr(dtype).removeprefix("mlx.core.")[:40]
        hint = "; to quantise the weights, use quantize=" if "int" in shown else ""
        raise ConfigError(f"dtype {shown} is not one of {', '.join(DTYPES)}{hint}")
    return parsed
