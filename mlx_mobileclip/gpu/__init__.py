"""Kernels and limits for GPUs; the counterpart of `cpu`."""
