"""FastVLM on Apple silicon, native in MLX.

from mlx_fastvlm import load, generate
model, processor = load("apple/FastVLM-0.5B")
print(generate(model, processor, "What is this?", images="cat.jpg").text)

The public names are listed in `api.py`, which is imported when one of them is first asked for, so
that commands start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_mobileclip import __version__ as __version__

if TYPE_CHECKING:
    from .api import *
else:  # generate/__init__.py says why
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
