"""FastVLM on Apple silicon, native in MLX.

from mlx_fastvlm import load, generate
model, processor = load("apple/FastVLM-0.5B")
print(generate(model, processor, "What is this?", images="cat.jpg").text)
"""

from typing import TYPE_CHECKING, Any

from mlx_mobileclip import __version__

if TYPE_CHECKING:
    from mlx_mobileclip.errors import (
        CheckpointError,
        ConfigError,
        ImageError,
        ModelError,
        PromptError,
    )
    from mlx_mobileclip.quantization import Quantization

    from .generate import Chunk, Result, Stats, generate, stream_generate
    from .image_cache import ImageCache
    from .loader import load
    from .model import FastVLM
    from .processor import Inputs, Processor
    from .prompt_cache import PromptCache

__all__ = [
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "FastVLM",
    "ImageCache",
    "ImageError",
    "Inputs",
    "ModelError",
    "Processor",
    "PromptCache",
    "PromptError",
    "Quantization",
    "Result",
    "Stats",
    "__version__",
    "generate",
    "load",
    "stream_generate",
]

_MODULES = {
    "load": ".loader",
    "FastVLM": ".model",
    "ImageCache": ".image_cache",
    "Quantization": "mlx_mobileclip.quantization",
    "Inputs": ".processor",
    "Processor": ".processor",
    "PromptCache": ".prompt_cache",
    **dict.fromkeys(("Chunk", "Result", "Stats", "generate", "stream_generate"), ".generate"),
    **dict.fromkeys(
        ("CheckpointError", "ConfigError", "ImageError", "ModelError", "PromptError"),
        "mlx_mobileclip.errors",
    ),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import mlx_fastvlm` is cheap."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_MODULES[name], __name__)
    if _MODULES[name] == ".generate":  # the import has put the module under the function's name
        globals()["generate"] = module.generate
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
