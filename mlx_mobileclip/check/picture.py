"""The test image of `check`, the same on every machine."""

import numpy as np
from PIL import Image, ImageDraw


def draw() -> Image.Image:
    """Shapes and lines on a shaded background with noise, 512 x 384 pixels."""
    corners = np.array(
        [[[30, 60, 120], [200, 180, 90]], [[90, 140, 70], [240, 240, 230]]], np.uint8
    )
    image = Image.fromarray(corners).resize((512, 384), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 50, 220, 210), fill=(200, 30, 40))
    draw.rectangle((280, 180, 440, 330), fill=(30, 90, 200))
    draw.polygon(((330, 20), (470, 150), (250, 140)), fill=(240, 200, 20))
    for x in range(20, 240, 20):
        draw.line((x, 250, x + 60, 360), fill=(10, 10, 10), width=4)
    noise = np.random.default_rng(0).normal(0, 6, (384, 512, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
