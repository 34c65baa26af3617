"""Self-contained HTML page of search results, without scripts."""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ..embedding.writers import new_file
from ..errors import DataError
from ..terminal import printable
from .match import Match
from .thumbnails import thumbnails

GENERATOR = '<meta name="generator" content="mlx-mobileclip">'
# Allow only embedded images and styles.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 16px;
  font: 13px/1.4 system-ui, sans-serif; }
.photos figure { margin: 0; overflow-wrap: anywhere; }
.photos img, .photos .gone { width: 100%; height: 180px; object-fit: contain; display: block;
  background: #8882; }
.photos figcaption { padding-top: 4px; }
.photos small { opacity: .7; }
"""
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 24px; font: 15px/1.4 system-ui, sans-serif; }
"""


def page(query: str, matches: Sequence[Match], summary: str) -> str:
    """Return a complete HTML page."""
    title = _escape(query or "photos")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'{GENERATOR}<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{PAGE_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n{grid(matches, summary)}</body></html>\n"
    )


def grid(matches: Sequence[Match], summary: str) -> str:
    """Return the thumbnail grid as an HTML fragment, as for a notebook."""
    images = thumbnails([match.path for match in matches])
    figures = "\n".join(_figure(m, image) for m, image in zip(matches, images, strict=True))
    return (
        f'<style>{STYLE}</style><p>{_escape(summary)}</p>\n<div class="photos">\n{figures}\n</div>'
    )


def _figure(match: Match, jpeg: bytes | None) -> str:
    name = _escape(os.path.basename(match.path))  # noqa: PTH119
    address = "file://" + quote(os.fsencode(match.path))
    picture = '<span class="gone">cannot be read</span>'
    if jpeg is not None:
        data = base64.b64encode(jpeg).decode()
        picture = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
    facts = [match.taken and match.taken.replace("T", " "), match.camera]
    facts += [f"relevance {match.relevance:.1f}", f"score {match.score:.3f}"]
    details = _escape(" · ".join(fact for fact in facts if fact))
    return (
        f'<figure><a href="{address}">{picture}</a>'
        f"<figcaption>{name}<br><small>{details}</small></figcaption></figure>"
    )


def _escape(text: str) -> str:
    return html.escape(printable(text))


def write_page(path: Path, text: str) -> None:
    """Write a page; only an earlier results page is overwritten.

    Raises:
        DataError: the path is some other file, or cannot be written.
    """
    try:
        if os.path.lexists(path):
            with path.open("rb") as file:
                if path.is_symlink() or GENERATOR.encode() not in file.read(1024):
                    raise DataError(f"{path}: exists and is not a results page; choose another")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); choose another") from error
    with new_file(path, replace=True, remedy="choose another") as file:
        file.write(text.encode())
