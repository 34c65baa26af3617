"""Convert FastVLM and MobileCLIP checkpoints of any known layout to the one that loads fastest.

from mlx_fastvlm.convert import convert  # in a checkout: from convert import convert
convert("apple/FastVLM-0.5B", "fastvlm-0.5b-4bit", quantize=True)
"""

from .options import ConvertOptions as ConvertOptions
from .pipeline import convert as convert

__all__ = ["ConvertOptions", "convert"]
