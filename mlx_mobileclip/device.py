"""What depends on the device that MLX computes on by default."""

import mlx.core as mx


def on_cpu() -> bool:
    """Whether the default device is the CPU."""
    return mx.default_device() == mx.Device(mx.cpu)
