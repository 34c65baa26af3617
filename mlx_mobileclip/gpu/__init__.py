"""GPU kernels and memory limits; the counterpart of `cpu`."""
