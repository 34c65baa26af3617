"""JPEG thumbnails for HTML pages, notebooks and terminals."""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from ..errors import ModelError
from ..preprocess.image import open_resized

SIDE = 256
QUALITY = 80
KITTY_CHUNK = 4096  # maximum characters per chunk, by the protocol
TERMINAL_ROWS = 8


def thumbnail(path: str, side: int = SIDE) -> bytes | None:
    """Upright JPEG of at most side x side px; None if the photo cannot be read."""

    def shrink(image: Image.Image) -> Image.Image:
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        return image

    try:
        small = open_resized(path, shrink)
    except ModelError:
        return None
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def thumbnails(paths: Sequence[str]) -> list[bytes | None]:
    """Create thumbnails in parallel."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(thumbnail, paths))


def terminal_protocol() -> str | None:
    """Graphics protocol of the terminal: "kitty", "iterm2" or None."""
    program, kind = os.environ.get("TERM_PROGRAM", ""), os.environ.get("TERM", "")
    if os.environ.get("KITTY_WINDOW_ID") or "kitty" in kind or program == "ghostty":
        return "kitty"
    return "iterm2" if program in ("iTerm.app", "WezTerm") else None


def escape_sequence(jpeg: bytes, protocol: str) -> str:
    """Escape sequence that displays a thumbnail.

    Sources: Kitty graphics protocol (chunked PNG), iTerm2 inline images (OSC 1337).
    """
    if protocol == "iterm2":
        data = base64.b64encode(jpeg).decode()
        return f"\x1b]1337;File=inline=1;size={len(jpeg)};height={TERMINAL_ROWS}:{data}\x07"
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    parts = [data[i : i + KITTY_CHUNK] for i in range(0, len(data), KITTY_CHUNK)]
    first = f"a=T,f=100,r={TERMINAL_ROWS},"
    return "".join(
        f"\x1b_G{first if i == 0 else ''}m={int(i + 1 < len(parts))};{part}\x1b\\"
        for i, part in enumerate(parts)
    )
