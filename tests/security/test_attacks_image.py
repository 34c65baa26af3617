"""Hostile images: refused in one line, or read as the reference reads them; never a crash."""

import io
import struct
import time
import zlib
from pathlib import Path

import isolated
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from mlx_mobileclip.errors import ImageError
from mlx_mobileclip.preprocess.image import open_image, resize_crop

Outcomes = dict[tuple[str, str], isolated.Outcome]
RED = (200, 30, 10)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], grey: bool = True) -> bytes:
    """A black PNG of any size in a few bytes."""
    compressor, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8 if grey else 1 + 3 * width)
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1 if grey else 8, 0 if grey else 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    result = b"\x89PNG\r\n\x1a\n"
    for kind, body in parts:
        checksum = zlib.crc32(kind + body)
        result += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    return result


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def plain(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(plain(), "JPEG", exif=exif)


def damaged_exif() -> bytes:
    return encoded(plain(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)


def palette(*, transparency: bytes | int) -> bytes:
    return encoded(plain().quantize(4), "PNG", transparency=transparency)


def frames(kind: str) -> bytes:
    others = [plain().rotate(90), Image.new("RGB", (40, 30), (0, 0, 255))]
    return encoded(plain(), kind, save_all=True, append_images=others)


def sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.full((30, 40), 0x80FF, np.uint16)), "PNG")


def scans(count: int) -> bytes:
    """A progressive JPEG that repeats its last scan; each costs a pass over the image."""
    data = encoded(plain(size=(2048, 2048)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def tiff_claims(**sizes: int) -> bytes:
    """A TIFF whose header claims other sizes than its data has."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    data = bytearray(encoded(plain(), "TIFF", tiffinfo=tags))
    start = struct.unpack("<I", data[4:8])[0]
    for i in range(struct.unpack("<H", data[start : start + 2])[0]):
        entry = start + 2 + 12 * i
        tag = struct.unpack("<H", data[entry : entry + 2])[0]
        names = {256: "width", 257: "height", 277: "samples"}
        if names.get(tag) in sizes:
            new = sizes[names[tag]]
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, new)
    return bytes(data)


BMP_FIELDS = (0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
BMP = b"BM" + struct.pack("<IIIIiiHHIIiiII", *BMP_FIELDS)
PSD = b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\1\0\0\0\1\0\x08\0\3" + bytes(99)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) run\n"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///x'/></svg>"
SIDES = "each side may have 1 to 16384 px"
FORMATS = "not an image in JPEG, PNG, WEBP, GIF, BMP, TIFF"
PIXELS = "more than 89 megapixels"
REFUSED: dict[str, tuple[bytes, str]] = {
    "bomb 13000.png": (png(13000, 13000), PIXELS),
    "bomb 30000.png": (png(30000, 100), SIDES),
    "bomb 60000.gif": (b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + b";", ""),
    "bomb.tiff": (tiff_claims(width=16000, height=16000), PIXELS),
    "bomb sides.tiff": (tiff_claims(width=1 << 31, height=2), ""),
    "samples.tiff": (tiff_claims(width=9, height=9, samples=65283), FORMATS),
    "bomb.webp": (
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xff\x3f\0\xff\x3f\0ANIM\x06\0\0\0" + bytes(6),
        "",
    ),
    "bomb.bmp": (BMP, PIXELS),
    "wide 60000x8.png": (png(60000, 8), SIDES),
    "tall 8x60000.png": (png(8, 60000), SIDES),
    "zero 0x0.png": (png(0, 0), ""),
    "many scans.jpg": (scans(2000), "scans"),
    "photoshop.psd": (PSD, FORMATS),
    "photoshop.png": (PSD, FORMATS),
    "postscript.eps": (EPS, FORMATS),
    "postscript.jpg": (EPS, FORMATS),
    "jpeg 2000.jp2": (encoded(plain(), "JPEG2000"), FORMATS),
    "drawing.svg": (SVG, FORMATS),
    "sky.fits": (b"SIMPLE  =                    T" + b" " * 50 + b"BITPIX  = 8", FORMATS),
    "texture.dds": (encoded(plain(), "DDS"), FORMATS),
    "icon.ico": (encoded(plain(), "ICO"), FORMATS),
    "document.pdf": (encoded(plain(), "PDF"), FORMATS),
    "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "sips -s format jpeg"),
    "empty.jpg": (b"", FORMATS),
    "one byte.jpg": (b"\xff", FORMATS),
    "noise.jpg": (bytes(range(256)) * 9, FORMATS),
    "signature.png": (b"\x89PNG\r\n\x1a\n", ""),
    "truncated.jpg": (encoded(plain(size=(400, 300)), "JPEG")[:-900], "damaged image"),
    "truncated.png": (encoded(Image.effect_noise((90, 90), 9), "PNG")[:999], "damaged image"),
    "truncated.webp": (encoded(Image.effect_noise((90, 90), 9), "WEBP")[:500], ""),
    "float.tiff": (encoded(Image.new("F", (9, 9), 1e30), "TIFF"), "32-bit pixels"),
    "escape \x1b]0;x\x07.jpg": (b"", FORMATS),
}  # fmt: skip

WIDE = encoded(Image.new("RGB", (16384, 2), RED), "PNG")
TALL = encoded(Image.new("RGB", (2, 8192), RED), "PNG")
READ: dict[str, tuple[bytes, tuple[int, int, int] | None]] = {
    "plain.png": (encoded(plain(), "PNG"), RED),
    "jpeg called.png": (encoded(plain(), "JPEG"), None),
    "1x1.png": (encoded(plain(size=(1, 1)), "PNG"), RED),
    "1x999.png": (encoded(plain(size=(1, 999)), "PNG"), None),
    "999x1.png": (encoded(plain(size=(999, 1)), "PNG"), None),
    "16384x2.png": (WIDE, None),
    "2x8192.png": (TALL, None),
    "grey.png": (encoded(plain("L"), "PNG"), (79, 79, 79)),
    "grey alpha.png": (encoded(plain("LA"), "PNG"), (79, 79, 79)),
    "one bit.png": (encoded(plain("1"), "PNG"), None),
    "alpha.png": (encoded(Image.new("RGBA", (40, 30), (*RED, 0)), "PNG"), RED),
    "palette.png": (encoded(plain().quantize(4), "PNG"), None),
    "palette tRNS.png": (palette(transparency=bytes([0, 128])), None),
    "palette one.png": (palette(transparency=0), None),
    "16 bits.png": (sixteen_bits(), (128, 128, 128)),
    "cmyk.jpg": (encoded(plain("CMYK"), "JPEG"), None),
    "ycbcr.tiff": (encoded(plain("YCbCr"), "TIFF"), None),
    "lab.tiff": (encoded(Image.new("LAB", (9, 9), (128, 128, 128)), "TIFF"), None),
    "rotated.jpg": (rotated_jpeg(), None),
    "damaged exif.jpg": (damaged_exif(), None),
    "animated.gif": (frames("GIF"), None),
    "animated.png": (frames("PNG"), RED),
    "animated.webp": (frames("WEBP"), None),
    "pages.tiff": (frames("TIFF"), RED),
    "mpo.jpg": (frames("MPO"), None),
    "ten scans.jpg": (scans(3), None),
    "text bomb.png": (
        png(9, 9, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(500_000)))),
        (0, 0, 0),
    ),
}  # fmt: skip
SOURCES = {
    "missing.jpg": "no such file",
    ".": "is a directory",
    "/dev/zero": "no such file",
    "http://169.254.169.254/latest": "URLs are not opened",
    "https://example.com/cat.jpg": "URLs are not opened",
    "file:///etc/passwd": "URLs are not opened",
    "data:image/png;base64,AAAA": "not an image in JPEG",
    "data:image/png;base64,A": "not valid base64",
    "data:image/png,abc": "not a data URI in base64",
    "data:" + "x" * 5000: "not a data URI in base64",
    "x\0.jpg": "no such file",
    "x" * 5000: "cannot be read",
    "~nobody-of-that-name/x.jpg": "no such file",
    "": "is a directory",
}
TOO_LONG_TO_CROP = ("16384x2.png", "2x8192.png")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Outcomes of all files and sources in both modes."""
    base = tmp_path_factory.mktemp("images")
    cases = []
    for name, (data, _) in (REFUSED | READ).items():
        (base / name).write_bytes(data)
        cases += [(str(base / name), mode) for mode in ("pad", "crop")]
    cases += [(source, mode) for source in SOURCES for mode in ("pad", "crop")]
    done = isolated.run([("image", list(case)) for case in cases])
    names = [(path.removeprefix(f"{base}/"), mode) for path, mode in cases]
    return dict(zip(names, done, strict=True))


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("name", REFUSED)
def test_hostile_image_is_refused(outcomes: Outcomes, name: str, mode: str) -> None:
    isolated.assert_refused(outcomes[name, mode], REFUSED[name][1], seconds=3, megabytes=300)


@pytest.mark.parametrize("source", SOURCES)
def test_hostile_source_is_refused(outcomes: Outcomes, source: str) -> None:
    isolated.assert_refused(outcomes[source, "pad"], SOURCES[source], seconds=1, megabytes=50)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("name", READ)
def test_odd_image_is_read(outcomes: Outcomes, name: str, mode: str) -> None:
    outcome = outcomes[name, mode]
    if mode == "crop" and name in (*TOO_LONG_TO_CROP, "1x999.png", "999x1.png"):
        isolated.assert_refused(outcome, "too elongated for a central square")
        return
    isolated.assert_done(outcome)
    assert outcome.seconds < 5
    assert outcome.grown_mb < 300
    if READ[name][1] is not None and mode == "pad":
        assert outcome.out == "{} {} {}\n".format(*READ[name][1])


def test_orientation_is_applied() -> None:
    assert open_image(rotated_jpeg()).size == (30, 40)


def test_later_frames_are_ignored() -> None:
    first = np.asarray(open_image(frames("PNG")))
    assert np.array_equal(first, np.asarray(plain()))


def test_crop_never_builds_a_long_image() -> None:
    started = time.perf_counter()
    with pytest.raises(ImageError, match="too elongated"):
        resize_crop(Image.new("RGB", (16384, 1)), 1536)
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 3), np.float32),
        np.zeros((3, 3, 2), np.uint8),
        np.zeros((3, 3, 3, 3), np.uint8),
        np.zeros((0, 3, 3), np.uint8),
        np.zeros((1, 20000, 3), np.uint8),
        np.zeros(3, np.uint8),
        np.array("x"),
    ],
    ids=str,
)
def test_array_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError):
        open_image(array)


@pytest.mark.parametrize("source", [None, 5, 1.5, ["x.jpg"], {}, object], ids=str)
def test_source_is_refused(source: object) -> None:
    with pytest.raises(ImageError, match="an image cannot be a"):
        open_image(source)


def test_damaged_pil_image_is_refused(tmp_path: Path) -> None:
    """Pillow reads lazily, so damage may show only after an image was opened."""
    path = tmp_path / "x.jpg"
    path.write_bytes(REFUSED["truncated.jpg"][0])
    with Image.open(path) as image, pytest.raises(ImageError):
        open_image(image)
