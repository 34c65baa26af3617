"""Invalid requests get a 4xx error in OpenAI's format that names the field."""

import json
from typing import Any

import pytest
from live_server import LiveServer

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
PNG = "data:image/png;base64,"


def image(url: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


FIELDS: list[tuple[dict[str, Any], str]] = [  # fields to set, and the field that the error names
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"surprise": 1}, "surprise"),
    ({"model": "gpt-5"}, "model"),
    ({"model": None}, "model"),
    ({"model": 7}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": [0]}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"seed": 1 << 70}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": "x" * 1000}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [USER] * 1001}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content[0]"),
    ({"messages": [{**USER, "x": 1}]}, "messages[0].x"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}, USER]},
        "messages[0].tool_calls",
    ),
    ({"messages": [image("https://example.com/a.png")]}, "messages[0].content[0].image_url.url"),
    ({"messages": [image("file:///etc/passwd")]}, "messages[0].content[0].image_url.url"),
    ({"messages": [image("/etc/passwd")]}, "messages[0].content[0].image_url.url"),
    ({"messages": [image(None)]}, "messages[0].content[0].image_url.url"),
    ({"messages": [image(PNG + "AAAA")]}, "messages[0].content[0]"),
    ({"messages": [image(PNG + "not base64!")]}, "messages[0].content[0]"),
    ({"messages": [image("data:image/png,plain")]}, "messages[0].content[0]"),
    ({"messages": [{**image(PNG + "AAAA"), "role": "system"}]}, "messages[0].content[0]"),
]


@pytest.mark.parametrize(("fields", "named"), FIELDS, ids=lambda v: str(v)[:60])
def test_invalid_fields_are_named(server: LiveServer, fields: dict[str, Any], named: str) -> None:
    reply = server.post(CHAT, {"model": "demo", "messages": [USER]} | fields)
    assert reply.status == 400, reply.data
    assert reply.error["param"] == named and named in reply.error["message"]
    assert "\n" not in reply.error["message"] and len(reply.error["message"]) < 400


MODEL_ERRORS: list[tuple[dict[str, Any], str]] = [  # raised by the model's own checks
    ({"messages": [{"role": "assistant", "content": "Hi"}]}, "last message must be the user's"),
    ({"messages": [USER, {"role": "system", "content": ""}, USER]}, "can only come first"),
    ({"messages": [{"role": "user", "content": "word " * 60_000}]}, "Shorten it"),
    ({"max_tokens": 2048, "messages": [{**USER, "content": "a b " * 1200}]}, "must be 1 to"),
    (
        {"response_format": {"type": "json_object"}, "stop": "}"},
        "schema and stop texts cannot be combined",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "king"}}}},
        "schema cannot be used",
    ),
]


@pytest.mark.parametrize(("fields", "message"), MODEL_ERRORS)
def test_errors_of_the_model(server: LiveServer, fields: dict[str, Any], message: str) -> None:
    body = {"model": "demo", "messages": [USER]} | fields
    for stream in (False, True):
        reply = server.post(CHAT, body | {"stream": stream})
        assert reply.status == 400 and message in reply.error["message"], reply.data


def test_damaged_image_is_named(server: LiveServer, scene: str) -> None:
    messages = [image(scene), {"role": "assistant", "content": "A"}, image(scene[: 22 + 4000])]
    reply = server.post(CHAT, {"model": "demo", "messages": messages})
    assert reply.status == 400 and reply.error["code"] == "invalid_image"
    assert reply.error["param"] == "messages[2].content[0]"
    assert "damaged image" in reply.error["message"]


BODIES = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "NaN": b'{"model": "demo", "temperature": NaN}',
    "infinity": b'{"model": "demo", "temperature": -Infinity}',
    "deep lists": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "many values": b'{"model": [' + b"[]," * 400_000 + b"[]]}",
    "huge integer": b'{"model": "demo", "max_tokens": ' + b"9" * 5000 + b"}",
    "huge exponent": b'{"model": "demo", "messages": "", "temperature": 1e999}',
    "lone surrogate": b'{"model": "\\ud800"}',
    "surrogate as a key": b'{"\\udfff": 1}',
    "not UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "demo"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"model": "demo"}',
    "duplicate key": b'{"model": "demo", "model": "demo"}',
    "NUL": b'{"model": "demo"}\0',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/classify"])
def test_invalid_bodies(server: LiveServer, path: str, body: bytes) -> None:
    reply = server.post(path, body)
    assert reply.status == 400 and reply.error["type"] == "invalid_request_error", reply.data


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_refused(server: LiveServer, kind: str) -> None:
    """Browsers send them cross-origin without a preflight request."""
    reply = server.request("POST", CHAT, b"{}", {"Content-Type": kind})
    assert reply.status == 415 and reply.error


def test_paths_and_methods(server: LiveServer) -> None:
    for method, path, status in (
        ("GET", "/", 404),  # without --ui
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%00", 404),
        ("GET", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("BREW", "/health", 405),
    ):
        reply = server.request(method, path)
        assert reply.status == status and reply.error, (method, path)
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert server.request("HEAD", "/health").status == 200


def test_errors_are_single_lines_without_control_characters(server: LiveServer) -> None:
    reply = server.post(CHAT, {"model": "a\x1b[31m\nb", "messages": [USER]})
    assert reply.status == 400 and reply.error["message"].isprintable()
    reply = server.post(CHAT, json.dumps({"x\ny": 1, "model": "demo", "messages": [USER]}).encode())
    assert reply.status == 400 and reply.error["message"].isprintable()
