"""Open images as hostile input and resize them exactly as the reference pipelines do.

Images are resized by Pillow, antialiased and as uint8. Results are bit-identical to the reference
pipelines: for FastVLM the CLIPImageProcessor of transformers 4.48, which Apple's code uses.
"""

import base64
import io
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import LFS_POINTER, ImageError
from ..paths import user_path
from .decoder_memory import DECODER_MEMORY
from .image_bounds import MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE, check_file, check_image, check_size

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG covers MPO
MAX_IMAGE_BYTES = 512 << 20
STRIP_PIXELS = 1 << 20  # fits a processor's cache
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {  # EXIF orientation: transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Without a handler, Pillow's log messages on damaged files would go to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def open_image(source: ImageSource, name: str = "image") -> Image.Image:
    """Open an image as RGB, upright.

    Args:
        source: Path, data URI, encoded bytes, file object, PIL image, or uint8 array (H, W),
            (H, W, 3) or (H, W, 4) of NumPy, MLX or anything that NumPy can convert.
        name: Name in error messages, unless the source is a path.

    Returns:
        RGB image: first frame, EXIF orientation applied, 16-bit grey reduced to 8 bits, alpha
        dropped as in the reference (`convert("RGB")`).

    Raises:
        ImageError: not an image of an accepted format, damaged, or beyond the limits: 16384 px a
            side, 89 megapixels, and those of `image_bounds` on time and memory.
    """
    return open_resized(source, lambda image: image, name)


def open_resized(
    source: ImageSource, resize: Callable[[Image.Image], Image.Image], name: str = "image"
) -> Image.Image:
    """Open an image as `open_image` does, and resize it.

    The memory of the decoded image stays reserved until it is resized. Threads that open large
    images wait until enough is free.

    Args:
        source: As for `open_image`.
        resize: Function that returns the resized image; it must not open images.
        name: As for `open_image`.
    """
    with ExitStack() as reserved:
        return resize(_open(source, name, reserved))


def _open(source: ImageSource, name: str, reserved: ExitStack) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if hasattr(source, "__array__"):  # MLX, PyTorch, JAX
        return _from_array(_as_numpy(source))
    if isinstance(source, Image.Image):
        return _decode(source, name, reserved)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), name, reserved)
    if not isinstance(source, (str, os.PathLike)) or is_data_uri(source):
        return _decode(io.BytesIO(read_image(source)), name, reserved)
    path = find_image(source)
    try:
        with path.open("rb") as file:
            return _decode(file, os.fspath(source), reserved)
    except OSError as error:
        raise ImageError(f"{source}: cannot be read ({error.strerror or error})") from error


def read_image(source: str | os.PathLike[str] | BinaryIO) -> bytes:
    """Read an encoded image as bytes, without decoding it.

    Args:
        source: Path, data URI, or file object; the position of a seekable file object is kept.

    Raises:
        ImageError: it cannot be read; see also `find_image`.
    """
    try:
        if isinstance(source, (str, os.PathLike)):
            if is_data_uri(source):
                return _from_data_uri(str(source))
            with find_image(source).open("rb") as file:
                return file.read(MAX_IMAGE_BYTES)
        return _read_file(source)
    except (OSError, ValueError) as error:  # ValueError: a closed file object
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{source}: cannot be read ({reason})") from error


def is_data_uri(source: object) -> bool:
    """Whether this is a data URI, such as `data:image/png;base64,...`."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def _from_data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"{uri[:40]}: not a data URI in base64; write data:image/png;base64,...")
    if len(body) > 4 * MAX_IMAGE_BYTES // 3:
        raise ImageError(f"{uri[:40]}: larger than {MAX_IMAGE_BYTES >> 20} MB; resize it first")
    try:
        return base64.b64decode(unquote(body), validate=True)
    except ValueError as error:
        raise ImageError(f"{uri[:40]}: not valid base64 ({error}); encode it again") from error


def _read_file(source: Any) -> bytes:
    if not hasattr(source, "read"):
        raise ImageError(
            f"an image cannot be a {type(source).__name__}; "
            "give a path, a data URI, bytes, a file object, a PIL image or a uint8 array"
        )
    seekable = hasattr(source, "seekable") and source.seekable()
    position = source.tell() if seekable else 0
    data = source.read(MAX_IMAGE_BYTES + 1)
    if seekable:
        source.seek(position)
    if not isinstance(data, bytes):
        raise ImageError("an image's file object must be opened in binary mode, with 'rb'")
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(f"an image is larger than {MAX_IMAGE_BYTES >> 20} MB; resize it first")
    return data


def find_image(source: str | os.PathLike[str]) -> Path:
    """The path of an image file, without opening it.

    Raises:
        ImageError: it is a URL, not a file, or larger than 512 MB.
    """
    name = os.fspath(source)
    if "://" in name:
        raise ImageError(f"{name[:80]}: URLs are not opened; download the image and give its path")
    try:
        path = user_path(name)
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "no such file"
            raise ImageError(f"{name}: {what}; give the path of an image")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise ImageError(f"{name}: larger than {MAX_IMAGE_BYTES >> 20} MB; resize it first")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name[:200]!r}: cannot be read ({reason})") from error
    return path


def _decode(source: Any, name: str, reserved: ExitStack) -> Image.Image:
    """Decode a file, or a PIL image that may not be loaded yet, to RGB."""
    try:
        is_pil_image = isinstance(source, Image.Image)
        opening_bytes = 0 if is_pil_image else check_file(source, name)
        reserved.enter_context(DECODER_MEMORY.reserve(opening_bytes))
        image = source if is_pil_image else Image.open(source, formats=FORMATS)
        file = getattr(image, "fp", None) if is_pil_image else source
        if file is None and getattr(image, "tile", None):
            raise ImageError(f"{name}: the file of this PIL image is closed; open it again")
        needed = check_image(image, file, name)
        if not opening_bytes:  # a second reservation could deadlock with other threads
            reserved.enter_context(DECODER_MEMORY.reserve(needed))
        if image.format == "TIFF":
            _silence_libtiff()
        image.load()
        check_size(image.width, image.height, name)
        orientation = image.getexif().get(ORIENTATION)
        image = _to_rgb(image)
        return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: more than {MAX_IMAGE_PIXELS / 1e6:.0f} megapixels; resize it first"
        ) from error
    except UnidentifiedImageError as error:
        hint = ""
        if source.seek(0) == 0 and source.read(len(LFS_POINTER)) == LFS_POINTER:
            hint = ", but a Git LFS pointer; run git lfs pull in its directory"
        if name.lower().endswith((".heic", ".heif")):
            hint = f"; on a Mac: sips -s format jpeg {name} --out photo.jpg"
        raise ImageError(f"{name}: not an image in {', '.join(FORMATS)}{hint}") from error
    except Exception as error:
        if is_pil_image and "closed image" in str(error):  # Pillow's message
            raise ImageError(f"{name}: this PIL image is closed; open it again") from error
        # Decoders raise almost anything on damaged files.
        raise ImageError(f"{name}: damaged image ({str(error)[:120]}); save it again") from error


@cache
def _silence_libtiff() -> None:
    """Turn off libtiff's messages on stderr; Pillow raises an error anyway."""
    import ctypes

    from PIL import _imaging

    with suppress(AttributeError, OSError):  # libtiff is linked statically, or missing
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _as_numpy(array: Any) -> NDArray[Any]:
    try:
        return np.asarray(array)
    except Exception as error:  # such as bfloat16, or a tensor on another device
        raise ImageError(
            f"an image array of type {type(array).__name__} cannot be converted to NumPy "
            f"({str(error)[:120]}); make it uint8 first"
        ) from error


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ImageError(
            f"an image array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), "
            f"not {array.dtype} of shape {array.shape}"
        )
    if array.ndim == 3 and array.shape[2] not in (3, 4):
        raise ImageError(f"an image array must have 3 or 4 channels last, not shape {array.shape}")
    check_size(array.shape[1], array.shape[0], "image")
    return _to_rgb(Image.fromarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _high_bytes(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_bytes(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits, in strips to save copies of the whole image."""
    result = Image.new("L", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(Image.fromarray((np.asarray(strip) >> 8).astype(np.uint8)), (0, top))
    return result


def open_square(source: ImageSource, size: int, mode: str, name: str = "image") -> Image.Image:
    """Decode an image and resize it to a square of `size` px, padded or cropped as `mode` says.

    Raises:
        ImageError: the image is damaged, or beyond the limits on images.
    """
    resize = resize_pad if mode == "pad" else resize_crop
    return open_resized(source, lambda whole: resize(whole, size), name)


def resize_pad(image: Image.Image, size: int) -> Image.Image:
    """Pad to a square with black bars and resize it to (size, size), without building the square.

    Equal to apple/ml-fastvlm 592b4ad `llava/mm_utils.py` expand2square followed by a bicubic
    resize. Pillow resizes horizontally, then vertically. Rows, then columns, are independent, so
    strips of them are resized in parallel, and the bars above and below the image are added
    between the two passes.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (size, side))  # after the first pass
    result = Image.new("RGB", (size, size))
    strip = max(1, STRIP_PIXELS // side)

    def resize_rows(start: int) -> None:
        end = min(start + strip, height)
        rows = image.crop((-left, start, side - left, end))  # black outside the image
        narrow.paste(rows.resize((size, end - start), Image.Resampling.BICUBIC), (0, top + start))

    def resize_columns(start: int) -> None:
        end = min(start + strip, size)
        columns = narrow.crop((start, 0, end, side))
        result.paste(columns.resize((end - start, size), Image.Resampling.BICUBIC), (start, 0))

    with ThreadPoolExecutor() as pool:
        list(pool.map(resize_rows, range(0, height, strip)))
        list(pool.map(resize_columns, range(0, size, strip)))
    return result


def resize_shorter(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize the shorter side to `size`; the longer one is rounded down.

    Raises:
        ImageError: the image is so elongated that its longer side would exceed 16384 px.
    """
    width, height = image.size
    longer = size * max(width, height) // min(width, height)
    if longer > MAX_IMAGE_SIDE:
        raise ImageError(
            f"an image of {width} x {height} px is too elongated for a central square; crop it"
        )
    return image.resize((size, longer) if width <= height else (longer, size), resample)


def resize_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size`, then centre-crop to (size, size).

    Source: transformers 4.48 `image_transforms.py` center_crop, which rounds offsets down.
    """
    resized = resize_shorter(image, size, Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> NDArray[np.float32]:
    """Convert an RGB image to float32 (H, W, 3) in [0, 1].

    The reference multiplies by 1 / 255 in float64 and rounds. Division in float32 gives the same
    256 values; multiplication in float32 would not.
    """
    values = np.asarray(image).astype(np.float32)
    values /= 255
    return values
