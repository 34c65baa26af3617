"""Open images as hostile input and resize them exactly as the reference pipelines do.

Resizing is Pillow's antialiased bicubic on uint8, as in the CLIPImageProcessor of transformers
4.48 that Apple's code runs on; results are equal to it bit for bit.
"""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG covers MPO
MAX_IMAGE_SIDE = 16384
MAX_IMAGE_PIXELS = 89_478_485  # above this Pillow itself warns of a decompression bomb
MAX_IMAGE_BYTES = 512 << 20
STRIP_PIXELS = 1 << 20  # fits a processor's cache
ORIENTATION = 0x0112  # EXIF tag

# float32(value * (1 / 255)) computed in float64, as the reference rescales.
RESCALE = (np.arange(256) * (1 / 255)).astype(np.float32)


def open_image(source: ImageSource) -> Image.Image:
    """Open an image upright and in RGB.

    Args:
        source: Path, encoded bytes, PIL image, or uint8 array (H, W), (H, W, 3) or (H, W, 4).

    Returns:
        RGB image: first frame, EXIF orientation applied, 16-bit grey reduced to 8 bits, alpha
        dropped as the reference does (`convert("RGB")`).

    Raises:
        ImageError: not an image of an accepted format, damaged, or beyond the limits of
            16384 px a side and 89 megapixels.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "image")
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), "image")
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"an image cannot be a {type(source).__name__}; "
            "give a path, bytes, a PIL image or a uint8 array"
        )
    name = os.fspath(source)
    if "://" in name or name.startswith("data:"):
        raise ImageError(f"{name[:80]}: URLs are not opened; download the image and give its path")
    path = Path(name).expanduser()
    try:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "no such file"
            raise ImageError(f"{name}: {what}; give the path of an image")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise ImageError(f"{name}: larger than {MAX_IMAGE_BYTES >> 20} MB; resize it first")
        with path.open("rb") as file:
            return _decode(file, name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name[:200]!r}: cannot be read ({reason})") from error


def _decode(file: Any, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
        _check_size(image.width, image.height, name)
        image.load()
        return _to_rgb(image, name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: more than {MAX_IMAGE_PIXELS / 1e6:.0f} megapixels; resize it first"
        ) from error
    except UnidentifiedImageError as error:
        hint = ""
        if name.lower().endswith((".heic", ".heif")):
            hint = f"; on a Mac: sips -s format jpeg {name} --out photo.jpg"
        raise ImageError(f"{name}: not an image in {', '.join(FORMATS)}{hint}") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise ImageError(f"{name}: damaged image ({str(error)[:120]}); save it again") from error


def _check_size(width: int, height: int, name: str) -> None:
    if not 1 <= width <= MAX_IMAGE_SIDE or not 1 <= height <= MAX_IMAGE_SIDE:
        raise ImageError(
            f"{name} is {width} x {height} px; "
            f"each side may have 1 to {MAX_IMAGE_SIDE} px. Resize it first"
        )
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError(
            f"{name} is {width} x {height} px, more than {MAX_IMAGE_PIXELS / 1e6:.0f} megapixels; "
            "resize it first"
        )


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ImageError(
            f"an image array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), "
            f"not {array.dtype} of shape {array.shape}"
        )
    if array.ndim == 3 and array.shape[2] not in (3, 4):
        raise ImageError(f"an image array must have 3 or 4 channels last, not shape {array.shape}")
    _check_size(array.shape[1], array.shape[0], "image")
    return Image.fromarray(array).convert("RGB")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.width, image.height, name)
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: 32-bit pixels have no fixed range; convert it to 8 bits first")
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_pad(image: Image.Image, size: int) -> Image.Image:
    """Pad to a black, centred square and resize it to (size, size), without ever building it.

    Equal to apple/ml-fastvlm 592b4ad `llava/mm_utils.py` expand2square followed by a bicubic
    resize. Pillow resizes rows first, then columns, so a wide image needs its bars only between
    the two passes, and a tall one is widened strip by strip.
    """
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if width > height:
        rows = image.resize((size, height), Image.Resampling.BICUBIC)
        tall = Image.new("RGB", (size, side))
        tall.paste(rows, (0, (side - height) // 2))
    else:
        tall = Image.new("RGB", (size, side))
        strip_height = max(1, STRIP_PIXELS // side)
        for top in range(0, height, strip_height):
            bottom = min(top + strip_height, height)
            strip = Image.new("RGB", (side, bottom - top))
            strip.paste(image, ((side - width) // 2, -top))
            tall.paste(strip.resize((size, bottom - top), Image.Resampling.BICUBIC), (0, top))
    return tall.resize((size, size), Image.Resampling.BICUBIC)


def resize_crop(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize the shorter side to `size`, then cut the central (size, size) out.

    Raises:
        ImageError: the image is so elongated that its resized long side exceeds 16384 px.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = size * long // short
    if resized_long > MAX_IMAGE_SIDE:
        raise ImageError(
            f"an image of {width} x {height} px is too elongated to crop; use --image-mode pad"
        )
    shape = (size, resized_long) if width <= height else (resized_long, size)
    resized = image.resize(shape, resample)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return resized.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> NDArray[np.float32]:
    """RGB image to float32 (H, W, 3) in [0, 1]."""
    return RESCALE[np.asarray(image)]
