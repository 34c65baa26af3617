"""FastVLM's conversation format (`qwen_2`), rendered from typed parts.

Prompts are not searched for markers: images are separate parts, and only this module
adds control tokens. Source: apple/ml-fastvlm 592b4ad `llava/conversation.py` conv_qwen_2.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mobileclip.errors import PromptError

from ..models.fastvlm import IMAGE_TOKEN
from .messages import Content, Image, Message, read_messages
from .tokenizer import TURN_END, TURN_START, Tokenizer

SYSTEM_PROMPT = "You are a helpful assistant."
CHARACTERS_PER_TOKEN = 8
MARKERS = ("<image>", TURN_START, TURN_END)  # suggest a text that is already rendered


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, by name."""

    token: str


Part = str | Image | Control


def render(
    prompt: str | Sequence[Message], image_count: int = 0, system: str | None = None
) -> list[Part]:
    """Render a prompt in the format of the training, up to the beginning of the answer.

    A line break follows each image, as in LLaVA's code and in the templates of other runtimes.

    Args:
        prompt: A question, or messages (see `messages.read_messages`).
        image_count: Number of images passed separately. They fill the image parts without a
            source, in order; without image parts, they come before the first user text.
        system: System prompt, unless the messages have one.

    Returns:
        Texts, images and control tokens in order; no two texts are adjacent.

    Raises:
        PromptError: a message is malformed, or the numbers of images and image parts differ.
    """
    turns = read_messages(prompt)
    if not isinstance(system, (str, type(None))):
        raise PromptError(f"system must be a text, not a {type(system).__name__}")
    if not turns or turns[-1][0] != "user":
        raise PromptError("the last message must be the user's; add a question")
    if any(role == "system" for role, _ in turns[1:]):
        raise PromptError("a system message can only come first; move it to the front")
    if turns[0][0] != "system":
        turns.insert(0, ("system", [SYSTEM_PROMPT if system is None else system]))
    elif system is not None:
        raise PromptError("both system= and a system message are given; leave one out")
    _place_images(turns, image_count)
    parts: list[Part] = []
    for role, content in turns:
        parts += [Control(TURN_START), f"{role}\n"]
        for part in content:
            parts += [part, "\n"] if isinstance(part, Image) else [part]
        parts += [Control(TURN_END), "\n"]
    return _join_texts([*parts, Control(TURN_START), "assistant\n"])


def _place_images(turns: list[tuple[str, Content]], image_count: int) -> None:
    images = [part for _, parts in turns for part in parts if isinstance(part, Image)]
    without_source = sum(image.source is None for image in images)
    if not images and image_count:
        first = next(parts for role, parts in turns if role == "user")
        first[:0] = [Image()] * image_count
    elif without_source != image_count:
        raise PromptError(
            f"the messages have places for {without_source} images but {image_count} are given"
        )


def _join_texts(parts: list[Part]) -> list[Part]:
    """Join adjacent texts: the tokenizer may merge across their boundary, as in the reference."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def encode(
    parts: list[Part], tokenizer: Tokenizer, tokens_per_image: int, max_length: int
) -> list[int]:
    """Encode rendered parts as ids, with one IMAGE_TOKEN for each image embedding.

    Raises:
        PromptError: more than `max_length` tokens, or more than 8 characters per allowed token,
            which is checked first.
    """
    characters = sum(len(part) for part in parts if isinstance(part, str))
    if characters > CHARACTERS_PER_TOKEN * max_length:
        raise PromptError(
            f"the prompt has {characters} characters; the model reads {max_length} tokens, "
            "images included. Shorten it"
        )
    _warn_about_markers(parts)
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Image):
            ids += [IMAGE_TOKEN] * tokens_per_image
        elif isinstance(part, Control):
            ids.append(tokenizer.added[part.token])
        else:
            ids += _encode_text(part, tokenizer)
    if len(ids) > max_length:
        raise PromptError(
            f"the prompt has {len(ids)} tokens, {ids.count(IMAGE_TOKEN)} of them for images; the "
            f"model reads {max_length}. Shorten it, give fewer images or a lower resolution"
        )
    return ids


def _warn_about_markers(parts: list[Part]) -> None:
    """Warn if a text seems to be rendered already; it is read literally."""
    texts = [part for part in parts if isinstance(part, str)]
    markers = [marker for marker in MARKERS if any(marker in text for text in texts)]
    if markers and not _warned:
        _warned.add(markers[0])
        warnings.warn(
            f"the prompt holds {markers[0]!r}, which is read as plain text: give images with "
            "images= or as parts, and messages as a list; this is reported once",
            stacklevel=2,
        )


_warned: set[str] = set()


def _encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        text.encode()
        return tokenizer.encode(text)
    except UnicodeEncodeError as error:  # a lone surrogate, as in undecodable arguments
        raise PromptError(f"the prompt is not valid Unicode ({error.reason}); retype it") from error
