"""MobileCLIP's image towers in MLX, and what reading any checkpoint or image needs."""

__version__ = "0.1.0"
