"""MobileCLIP on Apple silicon, native in MLX.

from mlx_mobileclip import load
model, processor = load("apple/MobileCLIP2-S0")
image = model.encode_image(processor.images(["cat.jpg"]), normalize=True)
texts = model.encode_text(processor.texts(["a cat", "a dog"]), normalize=True)
print(image @ texts.T)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .clip import MobileCLIP, MobileCLIPConfig
    from .errors import (
        CheckpointError,
        ConfigError,
        DataError,
        ImageError,
        ModelError,
        PromptError,
    )
    from .loader import load
    from .processor import Processor
    from .quantization import Quantization
    from .retrieval import Recall, recall, top_k_accuracy
    from .zeroshot import Prediction, classify, text_matrix

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ImageError",
    "MobileCLIP",
    "MobileCLIPConfig",
    "ModelError",
    "Prediction",
    "Processor",
    "PromptError",
    "Quantization",
    "Recall",
    "__version__",
    "classify",
    "load",
    "recall",
    "text_matrix",
    "top_k_accuracy",
]

_MODULES = {
    "load": ".loader",
    "MobileCLIP": ".clip",
    "MobileCLIPConfig": ".clip",
    "Processor": ".processor",
    "Quantization": ".quantization",
    **dict.fromkeys(("Prediction", "classify", "text_matrix"), ".zeroshot"),
    **dict.fromkeys(("Recall", "recall", "top_k_accuracy"), ".retrieval"),
    **dict.fromkeys(
        ("CheckpointError", "ConfigError", "DataError", "ImageError", "ModelError", "PromptError"),
        ".errors",
    ),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import mlx_mobileclip` is cheap."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
