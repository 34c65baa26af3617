"""Faster implementations of layers for MLX's CPU backend, most of them in float32.

Only `layers.py` imports from here (`loader.py` calls `process.configure`). Each file states which
change to MLX would make it unnecessary.
"""
