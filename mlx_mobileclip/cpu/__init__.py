"""Faster forms of some layers for MLX's CPU backend, in float32.

Only `layers.py` imports from here (`loader.py` calls `process.configure`). Each file begins with
what MLX would have to do to make it unnecessary.
"""
