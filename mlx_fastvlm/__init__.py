"""FastVLM on Apple silicon, in pure MLX.

from mlx_fastvlm import load, generate
model, processor = load("apple/FastVLM-0.5B")
print(generate(model, processor, "What is this?", images="cat.jpg").text)

The public names are in `api.py`, which is imported on first use so that commands start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_mobileclip import __version__ as __version__

if TYPE_CHECKING:
    from .api import *
else:  # see generate/__init__.py
    from . import generate

    del generate


def __getattr__(name: str) -> Any:
    names = vars(import_module(".api", __name__))
    if name == "__all__":
        return [name for name in names if not name.startswith("_")]
    if name.startswith("_") or name not in names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return names[name]


def __dir__() -> list[str]:
    return list(__getattr__("__all__"))
