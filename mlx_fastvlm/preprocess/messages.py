"""Read conversations in our own form and in those of OpenAI, Ollama and transformers.

An unknown key is an error, since an image under it would silently be missing from the prompt.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mobileclip.errors import PromptError
from mlx_mobileclip.preprocess.image import ImageSource

ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "path", "url", "base64")  # keys for the source of an image part
MAX_SHOWN = 60  # characters of a message in an error
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a prompt; `source` is None if it comes from `images=`."""

    source: ImageSource | None = None


Content = list[str | Image]


def read_messages(prompt: str | Sequence[Message]) -> list[tuple[str, Content]]:
    """Return the role and content of each message.

    Args:
        prompt: A question; or messages with the keys `role`, `content` and optionally `image` or
            `images`, which come before the content. The content is a text or a list of parts:
            {"type": "text", "text": ...};
            {"type": "image"}, whose source is under `image`, `path`, `url` or `base64`, or is the
            next of `images=`;
            {"type": "image_url", "image_url": {"url": ...} or a text}.
            A url is a data URI or a path; nothing is ever fetched.

    Raises:
        PromptError: a message is malformed or has an unknown key.
    """
    if isinstance(prompt, str):
        return [("user", [prompt])]
    if not isinstance(prompt, (list, tuple)):
        raise PromptError("a prompt must be a question or a list of messages")
    return [_read_message(message) for message in prompt]


def _read_message(message: Any) -> tuple[str, Content]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise PromptError(f"a message must be a dict whose role is one of {', '.join(ROLES)}")
    _check_keys(message, ("role", "content", "image", "images"), "a message")
    content = message.get("content")
    parts: Content = []
    if isinstance(content, str):
        parts.append(content)
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        parts += [_read_part(part) for part in content]
    else:
        raise PromptError("a message's content must be a text or a list of parts")
    return message["role"], [*_read_images(message), *parts]


def _read_images(message: Mapping[str, Any]) -> list[Image]:
    """Images that a message has apart from its content."""
    if message.get("image") is not None and message.get("images") is not None:
        raise PromptError("a message has both image and images; give one")
    if message.get("image") is not None:
        return [Image(_source(message["image"]))]
    images = message.get("images")
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        raise PromptError(f"a message's images must be a list, not a {type(images).__name__}")
    return [Image(_source(image)) for image in images]


def _read_part(part: Any) -> str | Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _check_keys(part, ("type", "text"), "a text part")
        text: str = part["text"]
        return text
    if kind == "image":
        _check_keys(part, ("type", *IMAGE_KEYS), "an image part")
        given = [key for key in IMAGE_KEYS if part.get(key) is not None]
        if len(given) > 1:
            raise PromptError(f"an image part has {' and '.join(given)}; give one")
        return Image(_source(part[given[0]])) if given else Image()
    if kind == "image_url":
        _check_keys(part, ("type", "image_url"), "an image_url part")
        return Image(_source(_openai_url(part.get("image_url"))))
    raise PromptError(
        'a part must be {"type": "text", "text": ...}, {"type": "image", ...} or '
        f'{{"type": "image_url", ...}}, not {str(part)[:MAX_SHOWN]}'
    )


def _openai_url(value: Any) -> str:
    if isinstance(value, Mapping):
        _check_keys(value, ("url", "detail"), "image_url")
        if value.get("detail", "auto") not in ("auto", None):
            raise PromptError("image_url: detail can only be auto; use resolution= instead")
        value = value.get("url")
    if not isinstance(value, str):
        raise PromptError('image_url must be {"url": a data URI or a path}')
    return value


def _source(value: Any) -> Any:
    """Source of an image; decodes plain base64, as in Ollama and transformers."""
    if isinstance(value, str) and len(value) >= 64 and len(value) % 4 == 0:
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            return value
        # A path can be valid base64, but not that of an image.
        if data.startswith(IMAGE_SIGNATURES):
            return data
    return value


def _check_keys(value: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    if unknown := [str(key) for key in value if key not in known]:
        raise PromptError(
            f"{what} has the unknown key {unknown[0][:MAX_SHOWN]!r}; known are {', '.join(known)}"
        )
