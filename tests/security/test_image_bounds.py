"""Costly image files are refused, or read within the promised bounds.

SECURITY.md promises less than 5 s and 900 MB for a megabyte of hostile input.
"""

import io
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import image_bombs as bombs
import isolated
import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from mlx_mobileclip.errors import ImageError
from mlx_mobileclip.preprocess.image import open_image

SECONDS, MEGABYTES = 5, 900
Bomb = Callable[[], bytes]


def deflated_square(side: int) -> bytes:
    """Compressed black RGB pixels, for one tile of a TIFF."""
    return zlib.compress(bytes(3 * side * side))


REFUSED: dict[str, tuple[Bomb, str]] = {
    "baseline scans": (lambda: bombs.baseline_scans(3000, 2048), "has 3000 scans of 2048 x 2048"),
    "progressive scans": (lambda: bombs.progressive_scans(3000), "has 3001 scans"),
    "arithmetic scans": (lambda: bombs.baseline_scans(300, 4096, 0xC9), "has 300 scans"),
    "arithmetic progressive scans": (lambda: bombs.progressive_scans(300, 4096, 0xCA), "scans"),
    "scans after a thumbnail": (
        lambda: bombs.exif_of(b"\xff\xda" * 9) + bombs.baseline_scans(3000)[2:],
        "has 3009 scans",
    ),
    "JPEG, 88 MP of coefficients": (
        lambda: bombs.progressive_scans(9, 9400),
        "88 megapixels of this format take 884 MB to decode, more than 850; resize it first",
    ),
    "pieces of EXIF": (lambda: bombs.exif_pieces(70_000), "has 70000 EXIF segments"),
    "colour profiles": (lambda: bombs.text_bombs(b"iCCP", 900), "has 900 colour profiles"),
    "zTXt": (lambda: bombs.text_bombs(b"zTXt", 900), "Too much memory used in text chunks"),
    "strips": (
        lambda: bombs.strips(200_000, 4, 16384, 1, bytes(900_000)),
        "has 200000 strips or tiles, more than 20000; save it as PNG",
    ),
    "strips over and over": (
        lambda: bombs.strips(16_384, 5000, 1000, 1, bytes(900_000)),
        "cover it several times",
    ),
    "tile of 268 MP": (lambda: bombs.tiles(16384, 16, 16, 8, b"x"), "cover it several times"),
    "tiles of no size": (lambda: bombs.tiles(0, 16, 16, 8, b"x"), "tiles of invalid size"),
    "tiles outside of a rotated image": (
        lambda: bombs.tiles(8192, 1, 16384, 8, b"x", orientation=6),
        "cover it several times",
    ),
    "tiles outside": (lambda: bombs.tiles(8192, 1, 16384, 8, b"x"), "cover it several times"),
    "scans in strips": (
        lambda: bombs.strips(5, 5000, 5000, 7, bombs.by_strip(5000, 1000, 90)),
        "scans in 5 strips",
    ),
    "strips that share scans": (
        lambda: bombs.strips(500, 5000, 5000, 7, bombs.by_strip(5000, 10, 90)),
        "scans in 500 strips",
    ),
    "LZMA": (lambda: bombs.strips(1, 9, 9, 34925, b"x"), "compressed as lzma, which is not"),
    "WebP of 34 bytes": (lambda: bombs.webp_canvas(16384, 5461)[:34], "take 1432 MB to decode"),
    "WebP, a frame": (lambda: bombs.webp_canvas(16383, 5461, 1), "take 1431 MB to decode"),
    "WebP, lossless": (lambda: bombs.encoded(bombs.black(7400), "WEBP", lossless=True), "876 MB"),
    "WebP, lossy": (lambda: bombs.lossy_webp(16383, 5461), "take 1431 MB to decode"),
    "BMP, RLE8": (lambda: bombs.bmp_rle(9400, 9400, 8, b"\1\0\0\0" * 9400), "run lengths"),
    "BMP, RLE4": (lambda: bombs.bmp_rle(9400, 9400, 4, b"\xff\x12" * 350_000), "run lengths"),
}
READ: dict[str, Bomb] = {
    "JPEG at the limits of time and memory": lambda: bombs.baseline_scans(14, 9200, 0xC9),
    "many small scans": lambda: bombs.baseline_scans(3000, 512),
    "PNG in single bytes": lambda: bombs.png(9400, 940, pieces=80_000),
    "PNG, RGBA": lambda: bombs.png(9400, 2350, colour=6),
    "tile of 17 MP": lambda: bombs.tiles(4096, 16, 16, 8, deflated_square(4096)),
    "strips of all bytes": lambda: bombs.strips(
        4096, 4, 4096, 8, zlib.compress(bytes(12)) + bytes(750_000)
    ),
    "WebP at the limit": lambda: bombs.webp_canvas(7280, 7280, 1),
    "WebP frames": lambda: bombs.webp_canvas(64, 64, 10_000),
    "GIF frames": lambda: bombs.gif(4000, 4000, frames=30_000),
    "GIF comments": lambda: bombs.gif(9, 9, b"!\xfe" + b"\1a" * 490_000 + b"\0"),
    "BMP, RLE4 at the limit": lambda: bombs.bmp_rle(
        4096, 4096, 4, (b"\xff\x12" * 17 + b"\0\0") * 4096
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, isolated.Outcome]:
    base = tmp_path_factory.mktemp("bombs")
    makers = {name: make for name, (make, _) in REFUSED.items()} | READ
    for name, make in makers.items():
        data = make()
        assert len(data) < 1.5e6 or name == "strips", name
        (base / name).write_bytes(data)
    done = isolated.run([("image", [str(base / name), "pad"]) for name in makers])
    return dict(zip(makers, done, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_costly_image_is_refused(outcomes: dict[str, isolated.Outcome], name: str) -> None:
    reason = REFUSED[name][1]
    isolated.assert_refused(outcomes[name], reason, seconds=SECONDS, megabytes=MEGABYTES)


@pytest.mark.parametrize("name", READ)
def test_is_read_within_the_bounds(outcomes: dict[str, isolated.Outcome], name: str) -> None:
    isolated.assert_done(outcomes[name])
    assert outcomes[name].seconds < SECONDS, outcomes[name]
    assert outcomes[name].grown_mb < MEGABYTES, outcomes[name]


def test_opened_image_is_checked() -> None:
    """A PIL image that the caller has opened and Pillow has not decoded yet."""
    image = Image.open(io.BytesIO(bombs.baseline_scans(3000)))
    with pytest.raises(ImageError, match="has 3000 scans"):
        open_image(image)


def test_closed_image_is_refused() -> None:
    image = Image.open(io.BytesIO(bombs.encoded(bombs.black(9), "PNG")))
    image.close()
    with pytest.raises(ImageError, match="the file of this PIL image is closed; open it again"):
        open_image(image)


CODINGS = {
    "raw": "RGB", "tiff_lzw": "RGB", "tiff_adobe_deflate": "RGB", "tiff_deflate": "RGB",
    "packbits": "RGB", "zstd": "RGB", "jpeg": "RGB", "group3": "1", "group4": "1",
    "tiff_ccitt": "1",
}  # fmt: skip


@pytest.mark.parametrize("rows", [8, 100])
@pytest.mark.parametrize("coding", CODINGS)
def test_sound_tiffs_are_read(coding: str, rows: int) -> None:
    """TIFFs have one strip or many; a JPEG-coded strip is a JPEG file itself."""
    image = Image.effect_noise((90, 100), 50).convert(CODINGS[coding])
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[278] = rows
    data = bombs.encoded(image, "TIFF", compression=coding, tiffinfo=info)
    with Image.open(io.BytesIO(data)) as theirs:
        expected = np.asarray(theirs.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(data)), expected)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_orientation_equals_pillow(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = bombs.encoded(Image.effect_noise((9, 5), 50).convert(mode), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as theirs:
        expected = np.asarray(ImageOps.exif_transpose(theirs).convert("RGB"))
    assert np.array_equal(np.asarray(open_image(data)), expected)


def test_16_bit_pixels_are_reduced_to_8_bits_in_every_strip() -> None:
    grey = np.random.default_rng(0).integers(0, 1 << 16, (1100, 1001), np.uint16)
    read = np.asarray(open_image(bombs.encoded(Image.fromarray(grey), "PNG")))
    assert np.array_equal(read, np.repeat((grey >> 8)[..., None], 3, axis=2))


def test_libtiff_writes_nothing_to_stderr(tmp_path: Path) -> None:
    """By default it reports every damaged row there, bypassing Python."""
    path = tmp_path / "damaged.tiff"
    path.write_bytes(bombs.damaged_fax(16_000))
    code = """
import sys
from PIL import Image
from mlx_mobileclip.preprocess.image import open_image
if sys.argv[2] == "ours":
    open_image(sys.argv[1])
    open_image(open(sys.argv[1], "rb").read())
else:
    Image.open(sys.argv[1]).load()
"""
    ours, theirs = (
        subprocess.run(
            [sys.executable, "-c", code, str(path), whose],
            capture_output=True, text=True, check=True, env=isolated.ENVIRONMENT,
        ).stderr.splitlines()
        for whose in ("ours", "theirs")
    )  # fmt: skip
    assert len(theirs) > 10_000
    assert ours == []
