"""Read a request for a chat completion.

Source: the OpenAPI description of OpenAI's API, /chat/completions.
"""

from dataclasses import dataclass
from typing import Any

from ..generation.request import Request
from .errors import bad
from .fields import Fields, shown
from .pictures import check_data_uri
from .settings import Settings

MAX_MESSAGES = 1000
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_TOP_LOGPROBS = 20
MAX_SEED = (1 << 63) - 1
# Unsupported fields, and the values that do not use the feature: clients may send those.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
}
# Accepted without effect: billing, storage and the like do not exist here.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "verbosity"),
)


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A checked chat request.

    Attributes:
        messages: In the format of `generate`, with images as data URIs.
        images: Their image parts by field name, such as "messages[0].content[1]"; mutable.
        options: Fields of `Request` besides the prompt.
        stream: Whether to stream the answer.
        include_usage: Whether a stream ends with token counts.
    """

    messages: list[dict[str, Any]]
    images: dict[str, dict[str, Any]]
    options: dict[str, Any]
    stream: bool
    include_usage: bool

    def request(self) -> Request:
        """Return the request for the model."""
        return Request(self.messages, **self.options)


def read_chat(body: Fields, settings: Settings) -> ChatCall:
    """Check a request and convert it to a `ChatCall`.

    Raises:
        ApiError: a field is invalid; the error names it.
    """
    for name, neutral in NEUTRAL.items():
        body.refuse(name, neutral)
    body.ignore(*IGNORED)
    stream = body.boolean("stream", False)
    stream_options = body.get("stream_options")
    include_usage = False
    if stream_options is not None:
        if not stream:
            raise body.error("stream_options", "needs stream: true")
        fields = Fields(stream_options, "stream_options")
        include_usage = fields.boolean("include_usage", False)
        fields.ignore("include_obfuscation")
        fields.end()
    options = {
        "max_tokens": _max_tokens(body, settings.max_tokens),
        "temperature": body.number("temperature", 0, 100, 0.0),
        "top_p": body.number("top_p", 0, 1, 1.0),
        "top_k": body.integer("top_k", 0, 1 << 30) or 0,
        "min_p": body.number("min_p", 0, 1, 0.0),
        "repetition_penalty": body.number("repetition_penalty", 0.01, 100, 1.0),
        "seed": _seed(body),
        "stop": _stops(body),
        "schema": _schema(body),
        "logprobs": _logprobs(body),
    }
    messages, images = read_messages(body, settings.max_images)
    body.end()
    return ChatCall(messages, images, options, stream, include_usage)


def _max_tokens(body: Fields, limit: int) -> int | None:
    names = ("max_completion_tokens", "max_tokens")
    given = {body.integer(name, 1, limit) for name in names} - {None}
    if len(given) > 1:
        raise body.error("max_tokens", "and max_completion_tokens differ; give one")
    return next(iter(given), None)


def _seed(body: Fields) -> int | None:
    seed = body.integer("seed", -MAX_SEED - 1, MAX_SEED)
    return None if seed is None else seed & MAX_SEED


def _stops(body: Fields) -> list[str]:
    if isinstance(value := body.get("stop"), str):
        stops = [value]
    else:
        stops = [] if value in (None, []) else body.texts("stop", MAX_STOPS)
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise body.error("stop", f"must be strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _logprobs(body: Fields) -> int | None:
    enabled = body.boolean("logprobs", False)
    top = body.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not enabled:
        raise body.error("top_logprobs", "needs logprobs: true")
    return (top or 0) if enabled else None


def _schema(body: Fields) -> dict[str, Any] | None:
    value = body.get("response_format")
    if value is None:
        return None
    response_format = Fields(value, "response_format")
    kind = response_format.choice("type", ("text", "json_object", "json_schema"), "text")
    if kind == "json_object":
        response_format.end()
        return {"type": "object"}
    if kind == "text":
        response_format.end()
        return None
    fields = Fields(response_format.get("json_schema", {}), "response_format.json_schema")
    response_format.end()
    fields.ignore("name", "description", "strict")  # every schema is enforced strictly
    schema = fields.get("schema")
    if not isinstance(schema, dict):
        raise fields.error("schema", f"must be a JSON schema, not {shown(schema)}")
    fields.end()
    return schema


def read_messages(
    body: Fields, max_images: int
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the messages in the format of `generate`, and their image parts by field name.

    Leading system and developer messages are merged.

    Raises:
        ApiError: a field is invalid; the error names it.
    """
    messages: list[dict[str, Any]] = []
    images: dict[str, dict[str, Any]] = {}
    for i, value in enumerate(body.items("messages", MAX_MESSAGES)):
        message = Fields(value, f"messages[{i}]")
        role, content = _read_message(message)
        for k, part in enumerate(content):
            if part["type"] == "image":
                images[f"messages[{i}].content[{k}]"] = part
        if len(images) > max_images:
            raise bad(f"the messages have more than {max_images} images", "messages")
        if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
            messages[0]["content"] += [{"type": "text", "text": "\n"}, *content]
        else:
            messages.append({"role": role, "content": content})
    return messages, images


def _read_message(message: Fields) -> tuple[str, list[dict[str, Any]]]:
    roles = ("system", "developer", "user", "assistant")
    if message.get("role") in ("tool", "function"):
        raise message.error("role", "is a tool's; tools are not supported")
    role = message.choice("role", roles, "")
    message.ignore("name")
    content = message.get("content")
    if role == "assistant":
        for name, neutral in (("tool_calls", ([],)), ("function_call", ()), ("audio", ())):
            message.refuse(name, neutral)
        message.ignore("refusal", "annotations")
        content = "" if content is None else content
    message.end()
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        where = message.name("content")
        parts = [_read_part(part, f"{where}[{k}]", role) for k, part in enumerate(content)]
    else:
        raise message.error("content", f"must be a string or a list of parts, not {shown(content)}")
    return ("system" if role == "developer" else role), parts


def _read_part(value: Any, where: str, role: str) -> dict[str, Any]:
    part = Fields(value, where)
    kind = part.text("type")
    if kind == "text":
        text = part.text("text")
        part.ignore("cache_control", "prompt_cache_breakpoint")
        part.end()
        return {"type": "text", "text": text}
    if kind == "image_url":
        if role != "user":
            raise bad(f"{where}: only user messages can have images", where)
        url = part.get("image_url")
        part.end()
        return {"type": "image", "image": read_image_url(url, f"{where}.image_url")}
    raise bad(f"{where}.type must be text or image_url, not {shown(kind)}", f"{where}.type")


def read_image_url(value: Any, where: str) -> str:
    """Return the data URI of `image_url`, which is {"url": ...} or the URI itself."""
    if not isinstance(value, dict):
        return check_data_uri(value, where)
    fields = Fields(value, where)
    fields.choice("detail", ("auto", "low", "high"), "auto")  # the checkpoint has one size
    url = check_data_uri(fields.get("url"), f"{where}.url")
    fields.ignore("format")
    fields.end()
    return url
