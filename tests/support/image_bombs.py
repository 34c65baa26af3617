"""Small files that cost decoders much time or memory, one generator per technique."""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from random import Random

from PIL import Image

RED = (200, 30, 10)


def black(side: int) -> Image.Image:
    return Image.new("RGB", (side, side))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


# JPEG


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def empty_jpeg(
    width: int, height: int, scans: Sequence[bytes], sof: int = 0xC0, sampling: int = 0x11
) -> bytes:
    """A three-component JPEG with scans (bodies of their headers) that hold no data."""
    frame = struct.pack(">BHHB", 8, height, width, 3)
    frame += b"".join(bytes([i, sampling if i == 1 else 0x11, 0]) for i in (1, 2, 3))
    codes = bytes([1]) + bytes(15) + bytes([0])  # one code, of one bit, for the symbol 0
    tables = b"".join(bytes([slot]) + codes for slot in (0x00, 0x10))
    head = segment(0xDB, bytes([0]) + bytes([1]) * 64) + segment(sof, frame)
    if sof < 0xC8:
        head += segment(0xC4, tables)
    return b"\xff\xd8" + head + b"".join(segment(0xDA, scan) for scan in scans) + b"\xff\xd9"


ALL_COMPONENTS = bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])
DC = bytes([3, 1, 0, 2, 0, 3, 0, 0, 0, 0])
LUMA_AC = bytes([1, 1, 0, 1, 63, 0])


def by_component(count: int) -> list[bytes]:
    return [bytes([1, 1 + i % 3, 0, 0, 63, 0]) for i in range(count)]


def baseline_scans(count: int, side: int = 2048, sof: int = 0xC0) -> bytes:
    """A sequential JPEG, baseline or arithmetic, that repeats the scans of its components."""
    return empty_jpeg(side, side, by_component(count), sof)


def progressive_scans(count: int, side: int = 2048, sof: int = 0xC2) -> bytes:
    return empty_jpeg(side, side, [DC, *[LUMA_AC] * count], sof)


def exif_of(body: bytes) -> bytes:
    """The beginning of a JPEG, with EXIF."""
    return b"\xff\xd8" + segment(0xE1, b"Exif\0\0" + body)


def by_strip(width: int, height: int, scans: int) -> bytes:
    """A baseline JPEG with many scans, for a strip of a TIFF."""
    return empty_jpeg(width, height, by_component(scans))


def exif_pieces(count: int) -> bytes:
    """A JPEG whose EXIF is in many segments, each appended to those before."""
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + segment(0xE1, b"Exif\0\0MM\0*") * count + data[2:]


# PNG


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, pieces: int = 0, colour: int = 0) -> bytes:
    """A black PNG; `colour` 0 is 1-bit grey, 2 RGB, 6 RGBA; begins with `pieces` tiny IDATs."""
    row = bytes(1 + {0: (width + 7) // 8, 2: 3 * width, 6: 4 * width}[colour])
    compressor = zlib.compressobj(9)
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8 if colour else 1, colour, 0, 0, 0)
    parts = [chunk(b"IDAT", data[i : i + 1]) for i in range(min(pieces, len(data)))]
    parts += [chunk(b"IDAT", b"")] * (pieces - len(parts)) + [chunk(b"IDAT", data[pieces:])]
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join([*chunks, *parts, end])


def text_bombs(kind: bytes, count: int) -> bytes:
    """A PNG with many chunks that each inflate to a megabyte."""
    head = {b"zTXt": b"c%d\0\0", b"iTXt": b"c%d\0\1\0\0\0", b"iCCP": b"c%d\0\0"}[kind]
    body = zlib.compress(bytes(1 << 20), 9)
    return png(9, 9, *[chunk(kind, head % i + body) for i in range(count)])


# TIFF

Tags = Mapping[int, tuple[int, Sequence[int]]]


def tiff(tags: Tags, body: bytes = b"") -> bytes:
    """A TIFF with tags (number: type 3 or 4, values); data at offset 8, then the directory."""
    start = 8 + len(body)
    entries, values = [], b""
    offset = start + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        data = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        entries.append(struct.pack("<HHI", tag, kind, len(numbers)))
        if len(data) <= 4:
            entries[-1] += data.ljust(4, b"\0")
        else:
            entries[-1] += struct.pack("<I", offset + len(values))
            values += data
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", start) + body + directory + values


def rgb_tiff(width: int, height: int, compression: int, **more: Sequence[int]) -> Tags:
    """The tags that every TIFF of 8-bit RGB has."""
    numbers = {
        256: [width], 257: [height], 258: [8, 8, 8], 259: [compression], 262: [2], 277: [3],
        **{int(key[1:]): values for key, values in more.items()},
    }  # fmt: skip
    return {tag: (4 if tag in (256, 257) or (tag > 269 and tag != 277) else 3, values)
            for tag, values in numbers.items()}  # fmt: skip


def strips(count: int, width: int, height: int, compression: int, body: bytes) -> bytes:
    """A TIFF whose strips are all the same bytes."""
    rows = -(-height // count)
    return tiff(
        rgb_tiff(
            width, height, compression, t273=[8] * count, t278=[rows], t279=[len(body)] * count
        ),
        body,
    )


def tiles(
    side: int, width: int, height: int, compression: int, body: bytes, orientation: int = 1
) -> bytes:
    """A TIFF whose square tiles are all the same bytes."""
    count = -(-width // side) * -(-height // side) if side else 1
    sizes = [len(body)] * count
    return tiff(
        rgb_tiff(
            width,
            height,
            compression,
            t274=[orientation],
            t322=[side],
            t323=[side],
            t324=[8] * count,
            t325=sizes,
        ),
        body,
    )


def damaged_fax(rows: int) -> bytes:
    """Random bytes as Group 3 data; libtiff warns about every row."""
    noise = Random(0).randbytes(20_000)
    tags = {256: [1000], 257: [rows], 258: [1], 259: [3], 262: [0], 273: [8], 277: [1],
            278: [rows], 279: [len(noise)]}  # fmt: skip
    return tiff({tag: (4, values) for tag, values in tags.items()}, noise)


# WebP, GIF, BMP


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP"
    for kind, data in chunks:
        body += kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def uint24(number: int) -> bytes:
    return struct.pack("<I", number)[:3]


def webp_canvas(width: int, height: int, frames: int = 0) -> bytes:
    """An animated WebP with a canvas and, if any, frames of 16 x 16 px."""
    picture = encoded(Image.new("RGB", (16, 16), RED), "WEBP")[12:]
    frame = uint24(0) + uint24(0) + uint24(15) + uint24(15) + uint24(9) + b"\0" + picture
    head = b"\2\0\0\0" + uint24(width - 1) + uint24(height - 1)
    chunks = [(b"VP8X", head), (b"ANIM", bytes(6)), *[(b"ANMF", frame)] * frames]
    return riff(*chunks)


def lossy_webp(width: int, height: int) -> bytes:
    """A lossy WebP with a header but no image data."""
    frame = uint24(0x10) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height)
    return riff((b"VP8 ", frame + bytes(20)))


def gif(width: int, height: int, extensions: bytes = b"", frames: int = 1) -> bytes:
    one = encoded(Image.new("P", (8, 8)), "GIF")
    start = one.index(b",")
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + one[start + 10 : -1]
    return screen + extensions + frame * frames + b";"


def bmp_rle(width: int, height: int, bits: int, body: bytes) -> bytes:
    """A run-length encoded BMP; `bits` is 8 or 4."""
    colours = bytes(4 << bits)
    start = 54 + len(colours)
    head = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)
    head += struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, 1 if bits == 8 else 2, len(body), 0, 0, 0, 0
    )
    return head + colours[:-4] + b"\1\2\3\0" + body
