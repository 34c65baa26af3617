"""Third-party clients."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pytest
from live_server import LiveServer, SlowBatch
from pydantic import BaseModel

from mlx_fastvlm.server.settings import Settings

openai = pytest.importorskip("openai", reason="needs pip install openai")


class Shapes(BaseModel):
    """A structured answer."""

    shape: Literal["circle", "star", "square"]
    count: Literal[1, 2, 3]


@pytest.fixture
def client(server: LiveServer) -> Any:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


@pytest.fixture
def messages(scene: str) -> list[Any]:
    content = [
        {"type": "image_url", "image_url": {"url": scene, "detail": "high"}},
        {"type": "text", "text": "How many circles are there?"},
    ]
    return [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": content}]


def test_openai_chat(client: Any, messages: list[Any]) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=messages, max_completion_tokens=50, temperature=0, logprobs=True
    )
    [choice] = answer.choices
    assert "circles" in choice.message.content and choice.finish_reason == "stop"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens - 1  # not the end
    assert answer.usage.total_tokens > answer.usage.prompt_tokens > 0


def test_openai_stream(client: Any, messages: list[Any]) -> None:
    whole = client.chat.completions.create(model="demo", messages=messages)
    stream = client.chat.completions.create(
        model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_stream_helper(client: Any, messages: list[Any]) -> None:
    with client.chat.completions.stream(model="demo", messages=messages) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content


def test_openai_parse(client: Any, messages: list[Any]) -> None:
    answer = client.chat.completions.parse(model="demo", messages=messages, response_format=Shapes)
    assert isinstance(answer.choices[0].message.parsed, Shapes)


def test_openai_embeddings(client: Any) -> None:
    texts = ["a red circle", "a blue star"]
    default = client.embeddings.create(model="demo", input=texts)  # asks for base64
    floats = client.embeddings.create(model="demo", input=texts, encoding_format="float")
    for a, b in zip(default.data, floats.data, strict=True):
        np.testing.assert_allclose(a.embedding, b.embedding, atol=1e-7)
    assert default.usage.prompt_tokens > 4


def test_openai_errors(client: Any, messages: list[Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="does not exist here") as caught:
        client.chat.completions.create(model="gpt-5", messages=messages)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="n 2 is not supported"):
        client.chat.completions.create(model="demo", messages=messages, n=2)
    assert client.models.list().data[0].id == client.models.retrieve("demo").id == "demo"


def test_openai_key_and_error_during_a_stream(start: Any) -> None:
    server = start(Settings(api_key="right", drain_s=0), SlowBatch)
    url = f"http://127.0.0.1:{server.port}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="key is missing or wrong"),
    ):
        client.models.list()
    with openai.OpenAI(base_url=url, api_key="right", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        next(stream)
        server.signal()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


@pytest.mark.clients
def test_litellm(server: LiveServer, messages: list[Any]) -> None:
    """Runs in a subprocess, as importing litellm takes seconds and warns."""
    code = f"""
import json, sys
import litellm
options = dict(model="openai/demo", api_base="http://127.0.0.1:{server.port}/v1", api_key="none")
messages = json.load(sys.stdin)
whole = litellm.completion(messages=messages, **options)
stream = litellm.completion(messages=messages, stream=True, **options)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
rows = litellm.embedding(input=["a red circle"], encoding_format="float", **options)
print(json.dumps([whole.choices[0].message.content, text, len(rows.data[0]["embedding"])]))
"""
    if find_spec("litellm") is None:
        pytest.skip("needs litellm: pip install litellm")
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(messages),
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # offline
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, text, size = json.loads(done.stdout.splitlines()[-1])
    assert whole == text and "circles" in whole and size > 100
