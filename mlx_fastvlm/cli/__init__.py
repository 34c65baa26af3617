"""The commands of `mlx-fastvlm`."""
