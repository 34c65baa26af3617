"""The package of the command `python -m mlx_fastvlm.generate`, which is in `__main__.py`.

The function `mlx_fastvlm.generate` has the same name. `mlx_fastvlm/__init__.py` imports this
package and deletes the name, so that no later import can replace the function.
"""
