"""Chat completions of the demo model, over HTTP."""

import base64
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from live_server import SCENE, LiveServer
from PIL import Image

from mlx_fastvlm import generate
from mlx_fastvlm.server.models import Models

CIRCLES = "How many circles are there?"


def part(uri: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def answer(server: LiveServer, content: Any, **fields: Any) -> str:
    reply = server.chat(content, **fields)
    assert reply.status == 200, reply.data
    return str(reply.json["choices"][0]["message"]["content"])


def test_answers_and_usage_match_generate(server: LiveServer, models: Models, scene: str) -> None:
    reply = server.chat([part(scene), text(CIRCLES)])
    expected = generate(models.model, models.processor, CIRCLES, str(SCENE))
    [choice] = reply.json["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, expected.finish_reason)
    assert reply.json["object"] == "chat.completion" and reply.json["model"] == "demo"
    usage = reply.json["usage"]
    assert usage["prompt_tokens"] == expected.stats.prompt_tokens
    assert usage["completion_tokens"] == expected.stats.generation_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] == expected.stats.image_tokens


def test_stream_has_the_same_text(server: LiveServer, scene: str) -> None:
    content = [part(scene), text(CIRCLES)]
    whole = answer(server, content)
    reply = server.chat(content, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, usage = reply.events
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == whole and len([delta for delta in deltas if delta]) > 3
    assert [event["choices"][0]["finish_reason"] for event in events][-2:] == [None, "stop"]
    assert {event["id"] for event in reply.events} == {usage["id"]}
    assert {event["object"] for event in reply.events} == {"chat.completion.chunk"}
    assert all(event["usage"] is None for event in events)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 3


def test_stream_without_usage(server: LiveServer) -> None:
    events = server.chat("Hi", stream=True, max_tokens=1).events
    assert all("usage" not in event for event in events)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_images_anywhere_in_the_messages(server: LiveServer, models: Models) -> None:
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    uris, images = {}, {}
    for name, colour in colours.items():
        images[name] = Image.new("RGB", (128, 128), colour)
        file = io.BytesIO()
        images[name].save(file, "PNG")
        uris[name] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    body = {
        "model": "demo",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [part(uris["red"]), text("Describe.")]},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": [text("And"), part(uris["blue"]), text("this?")]},
        ],
        "max_tokens": 12,
    }
    own = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": images["red"]}, text("Describe.")]},
        {"role": "assistant", "content": "Red."},
        {
            "role": "user",
            "content": [text("And"), {"type": "image", "image": images["blue"]}, text("this?")],
        },
    ]
    expected = generate(models.model, models.processor, own, max_tokens=12)
    reply = server.post("/v1/chat/completions", body)
    assert reply.json["choices"][0]["message"]["content"] == expected.text
    assert reply.json["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
    assert expected.stats.image_tokens == 2 * (models.processor.image_size // 64) ** 2


def test_leading_system_and_developer_messages_are_merged(server: LiveServer) -> None:
    def prompt_tokens(*messages: tuple[str, str]) -> int:
        listed = [{"role": role, "content": content} for role, content in messages]
        reply = server.post(
            "/v1/chat/completions", {"model": "demo", "messages": listed, "max_tokens": 1}
        )
        return int(reply.json["usage"]["prompt_tokens"])

    joined = prompt_tokens(("system", "Be brief.\nBe kind."), ("user", "Hi"))
    assert prompt_tokens(("system", "Be brief."), ("developer", "Be kind."), ("user", "Hi")) == (
        joined
    )


def test_stop_texts_and_max_tokens_end_an_answer(server: LiveServer, scene: str) -> None:
    content = [part(scene), text(CIRCLES)]
    assert answer(server, content) == "There are 2 circles."
    assert answer(server, content, stop=" circles") == "There are 2"
    assert answer(server, content, stop=["2", "nothing"]) == "There are "
    for name in ("max_tokens", "max_completion_tokens"):
        reply = server.chat(content, **{name: 2})
        assert reply.json["choices"][0]["finish_reason"] == "length"
        assert reply.json["usage"]["completion_tokens"] == 2


def test_seed_makes_sampling_repeatable(server: LiveServer) -> None:
    def sample(seed: int) -> str:
        return answer(server, "Hi", temperature=5, seed=seed, max_tokens=20)

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in (1, 2, -1)}) == 3


def test_log_probabilities(server: LiveServer, scene: str) -> None:
    content = [part(scene), text(CIRCLES)]
    [choice] = server.chat(content, logprobs=True, top_logprobs=2).json["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    for token in tokens:
        assert bytes(token["bytes"]).decode() == token["token"]
        best, second = token["top_logprobs"]
        assert best["token"] == token["token"]  # greedy decoding
        assert math.isclose(best["logprob"], token["logprob"], abs_tol=1e-5)
        assert second["logprob"] <= best["logprob"] <= 0
    events = server.chat(content, logprobs=True, top_logprobs=2, stream=True).events
    pieces = [event["choices"][0]["logprobs"] for event in events]
    streamed = [piece["content"][0]["token"] for piece in pieces if piece is not None]
    assert streamed == [token["token"] for token in tokens]
    assert (
        server.chat(content, logprobs=True).json["choices"][0]["logprobs"]["content"][0][
            "top_logprobs"
        ]
        == []
    )


SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "shape": {"enum": ["circle", "star"]},
    },
    "required": ["count", "shape"],
    "additionalProperties": False,
}


def test_schema_constrains_answers(server: LiveServer, scene: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    value = json.loads(answer(server, [part(scene), text(CIRCLES)], response_format=form))
    assert value.keys() == {"count", "shape"} and isinstance(value["count"], int)
    reply = server.chat("Hi", response_format={"type": "json_object"}, max_tokens=20)
    [choice] = reply.json["choices"]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].startswith("{")


def test_concurrent_answers_are_not_mixed_up(server: LiveServer, scene: str) -> None:
    questions: list[Any] = [
        [part(scene), text(CIRCLES)],
        "Hello",
        [part(scene), text("What colour is the square?")],
        [part(scene), text("Describe the image.")],
        "What is this?",
    ]
    alone = [answer(server, question) for question in questions]
    with ThreadPoolExecutor(10) as clients:
        together = list(clients.map(lambda question: answer(server, question), questions * 4))
    assert together == alone * 4
    assert len(set(alone)) > 3


@pytest.mark.parametrize("name", ["demo"])
def test_models_are_listed(server: LiveServer, name: str) -> None:
    assert [model["id"] for model in server.get("/v1/models").json["data"]] == [name]
    assert server.get(f"/v1/models/{name}").json["id"] == name
    assert server.get("/v1/models/org/other").status == 404
