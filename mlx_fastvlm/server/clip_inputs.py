"""Inputs of embeddings and classification, in the formats of several servers.

| item | from |
|---|---|
| "a text" | OpenAI |
| "data:image/...", with or without `"modality": "image"` beside | infinity, mlx-vlm |
| {"text": ...}, {"image": a data URI or plain base64} | jina |
| {"type": "image_url", "image_url": {"url": ...}} and the like | mlx-vlm |
"""

from dataclasses import dataclass
from typing import Any, Literal

from .errors import bad
from .fields import Fields, shown
from .pictures import check_data_uri

MAX_INPUTS = 256
MAX_CHARACTERS = 10_000  # of a text; MobileCLIP reads 77 tokens
IMAGE_KEYS = ("image", "image_url", "url")


@dataclass(frozen=True, slots=True)
class Item:
    """A text, or an image as a data URI; `where` is its field name in the request."""

    kind: Literal["text", "image"]
    value: str
    where: str


def read_inputs(body: Fields, max_images: int) -> list[Item]:
    """Read `input` and `modality`.

    Raises:
        ApiError: an input is invalid; the error names it.
    """
    modality = body.choice("modality", ("text", "image"), "text")
    forced = "image" if modality == "image" else None
    value = body.get("input")
    if isinstance(value, (str, dict)):
        items = [_read_item(value, "input", forced)]
    else:
        values = body.items("input", MAX_INPUTS)
        items = [_read_item(item, f"input[{i}]", forced) for i, item in enumerate(values)]
    images = sum(item.kind == "image" for item in items)
    if images > max_images:
        raise body.error("input", f"has {images} images; give at most {max_images} at a time")
    return items


def _read_item(value: Any, where: str, modality: str | None) -> Item:
    if isinstance(value, str):
        if modality == "image" or value[:11].lower() == "data:image/":
            return Item("image", check_data_uri(value, where), where)
        return _text(value, where)
    if not isinstance(value, dict):
        problem = "token ids are not supported" if isinstance(value, (int, list)) else shown(value)
        raise bad(f"{where} must be a string or an object with a text or image: {problem}", where)
    fields = Fields(value, where)
    fields.choice("type", ("text", "image", "image_url", "input_image", "input_text"), "text")
    given = [key for key in ("text", *IMAGE_KEYS) if fields.get(key) is not None]
    fields.end()
    if len(given) != 1:
        raise bad(f"{where} must have one of text, image, image_url and url", where)
    if given == ["text"]:
        return _text(fields.text("text"), where)
    return Item("image", _image(fields.get(given[0]), f"{where}.{given[0]}", given[0]), where)


def _text(value: str, where: str) -> Item:
    if not value.strip():
        raise bad(f"{where} is empty", where)
    if len(value) > MAX_CHARACTERS:
        raise bad(f"{where} has more than {MAX_CHARACTERS} characters; shorten it", where)
    return Item("text", value, where)


def _image(value: Any, where: str, key: str) -> str:
    if isinstance(value, dict):
        fields = Fields(value, where)
        fields.ignore("detail")
        value, where = fields.get("url"), f"{where}.url"
        fields.end()
    if key == "image" and isinstance(value, str) and len(value) > 64 and ":" not in value[:16]:
        return f"data:image/unknown;base64,{value}"  # jina takes plain base64
    return check_data_uri(value, where)
