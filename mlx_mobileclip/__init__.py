"""MobileCLIP on Apple silicon, native in MLX.

from mlx_mobileclip import load
model, processor = load("apple/MobileCLIP2-S0")
image = model.encode_image(processor.images(["cat.jpg"]), normalize=True)
texts = model.encode_text(processor.texts(["a cat", "a dog"]), normalize=True)
print(image @ texts.T)

The public names are listed in `api.py`, which is imported on first access, so that commands start
quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import *


def __getattr__(name: str) -> Any:
    names = vars(import_module(".api", __name__))
    if name == "__all__":
        return [name for name in names if not name.startswith("_")]
    if name.startswith("_") or name not in names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return names[name]


def __dir__() -> list[str]:
    return list(__getattr__("__all__"))
