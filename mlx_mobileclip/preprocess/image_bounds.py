"""Bounds on the time and memory of decoding an image file, checked before decoding.

A small file can require much work: a JPEG can repeat scans over all of its pixels, a TIFF can have
tiles outside the image. Cameras and image editors do not write such files.
"""

import re
import struct
from typing import Any

from PIL import Image, ImageFile

from ..errors import ImageError
from .decoder_memory import MAX_DECODER_BYTES

MAX_IMAGE_SIDE = 16384
MAX_IMAGE_PIXELS = 89_478_485  # above this Pillow itself warns of a decompression bomb
MAX_SCANNED_PIXELS = 1_200_000_000  # JPEG: scans x pixels; 13 scans at 89 MP, 100 at 12 MP
MAX_SCANS_PER_STRIP = 3  # JPEG scans of a TIFF strip or tile: one for each colour
MAX_EXIF_SEGMENTS = 256  # JPEG; for each of them Pillow copies all earlier ones
MAX_COLOUR_PROFILES = 16  # PNG: valid files have one; each can inflate to a megabyte
MAX_TIFF_STRIPS = 20_000  # strips or tiles
MAX_TIFF_COVERAGE = 5  # how often strips may cover the image: once per channel
MAX_RLE_PIXELS = 1 << 24  # Pillow decodes run-length BMP in Python, pixel by pixel
# Without LZMA, where the file sets the decoder's memory, and without obsolete compressions.
TIFF_COMPRESSIONS = (
    *("raw", "tiff_ccitt", "group3", "group4", "tiff_lzw", "jpeg", "tiff_adobe_deflate"),
    *("packbits", "tiff_deflate", "zstd"),
)
WIDTH, HEIGHT, BITS, STRIP_SIZES = 256, 257, 258, 279  # tags of a TIFF
TILE_WIDTH, TILE_HEIGHT, TILE_SIZES = 322, 323, 325
BLOCK = 1 << 16
WEBP_BYTES = 12  # per pixel: two canvases and the decoded frame, besides Pillow's image


def check_size(width: int, height: int, name: str) -> None:
    """Raise ImageError if the size, in px, is beyond the limits."""
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


def check_file(file: Any, name: str) -> int:
    """Refuse a file that takes much time or memory when Pillow opens it.

    Args:
        file: Seekable binary file; left at its start.
        name: Name in error messages.

    Returns:
        Bytes that opening and decoding take, if they must be reserved before opening; else 0.

    Raises:
        ImageError: it exceeds a bound.
    """
    file.seek(0)
    head = file.read(30)
    needed = 0
    if head.startswith(b"\xff\xd8") and (count := _count(file, b"Exif\0\0")) > MAX_EXIF_SEGMENTS:
        raise ImageError(f"{name}: has {count} EXIF segments instead of one; save it again")
    if head.startswith(b"\x89PNG") and (count := _count(file, b"iCCP")) > MAX_COLOUR_PROFILES:
        raise ImageError(f"{name}: has {count} colour profiles instead of one; save it again")
    if size := _webp_size(head):
        check_size(*size, name)
        needed = _check_memory(size[0] * size[1], 4 + WEBP_BYTES, name)
    file.seek(0)
    return needed


def check_image(image: Image.Image, file: Any, name: str) -> int:
    """Refuse an image that would take too long or too much memory to decode to RGB.

    Args:
        image: PIL image, decoded or not.
        file: Seekable file of the image, whose position is kept; None if not known.
        name: Name in error messages.

    Returns:
        Bytes that decoding it and converting it to RGB take.

    Raises:
        ImageError: it exceeds a bound.
    """
    check_size(image.width, image.height, name)
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: 32-bit pixels have no fixed range; convert it to 8 bits first")
    pixels = image.width * image.height
    stored = 1 if image.mode in ("1", "L", "P") else 4
    decoder = 0
    if isinstance(image, ImageFile.ImageFile) and image.tile:
        if image.format in ("JPEG", "MPO"):
            decoder = _check_jpeg(image, file, name)
        elif image.format == "TIFF":
            pixels, decoder = _check_tiff(image, file, name)
        elif image.tile[0][0] == "bmp_rle" and pixels > MAX_RLE_PIXELS:
            raise ImageError(
                f"{name}: has {pixels / 1e6:.0f} megapixels of run lengths, more than "
                f"{MAX_RLE_PIXELS / 1e6:.0f}; save it as PNG"
            )
    if image.format == "WEBP":
        decoder = WEBP_BYTES
    # Converting or rotating it makes a second image of 4 bytes per pixel.
    return _check_memory(pixels, stored + max(decoder, 4), name)


def _check_memory(pixels: int, bytes_per_pixel: int, name: str) -> int:
    needed = pixels * bytes_per_pixel
    if needed > MAX_DECODER_BYTES:
        raise ImageError(
            f"{name}: {pixels / 1e6:.0f} megapixels of this format take {needed / 1e6:.0f} MB to "
            f"decode, more than {MAX_DECODER_BYTES / 1e6:.0f}; resize it first"
        )
    return needed


def _check_jpeg(image: Any, file: Any, name: str) -> int:
    """Return the decoder's bytes per pixel: with several scans it stores all coefficients."""
    scans = _count(file, b"\xff\xda")  # an upper bound, as thumbnails count too
    if scans * image.width * image.height > MAX_SCANNED_PIXELS:
        raise ImageError(
            f"{name}: has {scans} scans of {image.width} x {image.height} px, which take too long "
            "to decode; save it again"
        )
    if scans < 2:
        return 0
    # A layer is (id, horizontal and vertical sampling factor, table).
    across, down = (max(layer[i] for layer in image.layer) for i in (2, 1))
    samples = sum(layer[1] * layer[2] for layer in image.layer)
    return -(-2 * samples // max(across * down, 1))


def _check_tiff(image: Any, file: Any, name: str) -> tuple[int, int]:
    """Return the pixels to decode, including padding of tiles, and libtiff's bytes per pixel."""
    compression, tags = image.info["compression"], image.tag_v2
    if compression not in TIFF_COMPRESSIONS:
        raise ImageError(
            f"{name}: compressed as {compression}, which is not supported; save it as PNG"
        )
    width, height = tags[WIDTH], tags[HEIGHT]  # image.width and height are after orientation
    if TILE_WIDTH in tags:
        across, down = tags[TILE_WIDTH], tags.get(TILE_HEIGHT, 0)
        if not isinstance(across, int) or not isinstance(down, int) or min(across, down) < 1:
            raise ImageError(f"{name}: has tiles of invalid size; save it again")
        width, height = -(-width // across) * across, -(-height // down) * down
    sizes = _as_tuple(tags.get(TILE_SIZES, tags.get(STRIP_SIZES, ())))
    covered = sum((x1 - x0) * (y1 - y0) for _, (x0, y0, x1, y1), *_ in image.tile)
    if len(sizes) > MAX_TIFF_STRIPS or len(image.tile) > MAX_TIFF_STRIPS:
        count = max(len(sizes), len(image.tile))
        raise ImageError(
            f"{name}: has {count} strips or tiles, more than {MAX_TIFF_STRIPS}; save it as PNG"
        )
    if width * height > MAX_IMAGE_PIXELS or covered > MAX_TIFF_COVERAGE * width * height:
        raise ImageError(f"{name}: its strips or tiles cover it several times; save it as PNG")
    if compression == "jpeg":
        strips = max(len(sizes), 1)
        scans, end = _count(file, b"\xff\xda"), file.seek(0, 2)
        if scans > MAX_SCANS_PER_STRIP * strips or sum(sizes) > end:
            raise ImageError(f"{name}: has {scans} scans in {strips} strips; save it again")
    bits = sum(_as_tuple(tags.get(BITS, 1)))
    return width * height, 0 if compression == "raw" else -(-bits // 8)


def _as_tuple(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _count(file: Any, pattern: bytes) -> int:
    """Count a byte sequence in a file without reading it whole."""
    position, count, rest = file.tell(), 0, b""
    file.seek(0)
    while block := file.read(BLOCK):
        block = rest + block
        count += len(re.findall(pattern, block))  # several times faster than bytes.count
        rest = block[1 - len(pattern) :]
    file.seek(position)
    return count


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height in px of a WebP's canvas, which Pillow allocates on opening.

    Source: RFC 9649 (container, lossless bitstream), RFC 6386 (lossy bitstream).
    """
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    if head[12:16] == b"VP8X":
        width, height = (int.from_bytes(head[i : i + 3], "little") for i in (24, 27))
        return width + 1, height + 1
    if head[12:16] == b"VP8L":
        (bits,) = struct.unpack("<I", head[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", head[26:30])
    return width & 0x3FFF, height & 0x3FFF
