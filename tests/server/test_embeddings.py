"""Embeddings and classification with MobileCLIP, in the formats of several servers."""

import base64
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from live_server import SCENE, LiveServer, SlowBatch

from mlx_fastvlm.server.models import Models
from mlx_mobileclip.eval.zero_shot import classify

TEXTS = ["a red circle", "a blue star"]
EMBEDDINGS, CLASSIFY = "/v1/embeddings", "/v1/classify"


def embed(server: LiveServer, value: Any, **fields: Any) -> np.ndarray[Any, Any]:
    reply = server.post(EMBEDDINGS, {"model": "demo", "input": value, **fields})
    assert reply.status == 200, reply.data
    assert [entry["index"] for entry in reply.json["data"]] == list(range(len(reply.json["data"])))
    return np.array([entry["embedding"] for entry in reply.json["data"]], np.float32)


def expected_texts(models: Models, *, normalize: bool = True) -> np.ndarray[Any, Any]:
    assert models.clip is not None
    model, processor = models.clip
    return np.array(model.encode_text(processor.texts(TEXTS), normalize=normalize))


def expected_scene(models: Models) -> np.ndarray[Any, Any]:
    assert models.clip is not None
    model, processor = models.clip
    return np.array(model.encode_image(processor.images([str(SCENE)]), normalize=True))


def test_text_embeddings(server: LiveServer, models: Models) -> None:
    expected = expected_texts(models)
    np.testing.assert_allclose(embed(server, TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(embed(server, TEXTS[0]), expected[:1], atol=1e-6)
    lengths = np.linalg.norm(embed(server, TEXTS), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_base64_has_the_same_values(server: LiveServer) -> None:
    body = {"model": "demo", "input": TEXTS, "encoding_format": "base64"}
    data = server.post(EMBEDDINGS, body).json["data"]
    rows = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data]
    np.testing.assert_array_equal(np.stack(rows), embed(server, TEXTS))


def test_image_formats(server: LiveServer, models: Models, scene: str) -> None:
    expected = expected_scene(models)
    plain = scene.partition(",")[2]
    shapes: list[tuple[Any, dict[str, Any]]] = [
        (scene, {"modality": "image"}),  # infinity
        ([scene], {}),
        ([{"image": scene}], {"normalized": True, "embedding_type": "float"}),  # jina
        ([{"image": plain}], {"task": "retrieval.query"}),
        ({"type": "image_url", "image_url": {"url": scene}}, {}),  # mlx-vlm
        ([{"type": "input_image", "image_url": scene}], {}),
        ([{"type": "image", "image": scene}], {}),
        ([{"url": scene}], {}),
    ]
    for value, fields in shapes:
        np.testing.assert_allclose(embed(server, value, **fields), expected, atol=1e-5)


def test_texts_and_images_keep_their_order(server: LiveServer, models: Models, scene: str) -> None:
    rows = embed(server, [{"text": TEXTS[0]}, {"image": scene}, TEXTS[1]])
    text_rows = expected_texts(models)
    expected = np.concatenate([text_rows[:1], expected_scene(models), text_rows[1:]])
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_many_texts_are_embedded_in_batches(server: LiveServer) -> None:
    rows = embed(server, [f"{i} red circles" for i in range(70)])
    np.testing.assert_allclose(rows[69:], embed(server, "69 red circles"), atol=1e-5)
    assert len(rows) == 70


def test_unnormalised_embeddings(server: LiveServer, models: Models) -> None:
    rows = embed(server, TEXTS, normalized=False)
    np.testing.assert_allclose(rows, expected_texts(models, normalize=False), rtol=1e-4, atol=1e-5)


def test_token_usage(server: LiveServer, models: Models) -> None:
    assert models.clip is not None
    tokenizer = models.clip[1].tokenizer
    count = sum(len(tokenizer.encode(text)) + 2 for text in TEXTS)  # with start and end
    usage = server.post(EMBEDDINGS, {"model": "demo", "input": TEXTS}).json["usage"]
    assert usage == {"prompt_tokens": count, "total_tokens": count}


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a"] * 257}, "input"),
    ({"input": ""}, "input"),
    ({"input": [5, 6]}, "input[0]"),
    ({"input": [[5, 6]]}, "input[0]"),
    ({"input": ["a", None]}, "input[1]"),
    ({"input": ["x" * 10_001]}, "input[0]"),
    ({"input": [{}]}, "input[0]"),
    ({"input": [{"text": "a", "image": "b"}]}, "input[0]"),
    ({"input": [{"text": "a", "x": 1}]}, "input[0].x"),
    ({"input": [{"image": "/etc/passwd"}]}, "input[0].image"),
    ({"input": [{"image": "https://example.com/" + "a" * 99}]}, "input[0].image"),
    ({"input": "https://example.com/a.png", "modality": "image"}, "input"),
    ({"input": "a", "modality": "audio"}, "modality"),
    ({"input": ["data:image/png;base64,AAAA"]}, "input[0]"),
    ({"input": ["data:image/png;base64,AAAA"] * 17}, "input"),
    ({"input": "a", "dimensions": 7}, "dimensions"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "normalized": 1}, "normalized"),
    ({"input": "a", "model": "other"}, "model"),
    ({"input": "a", "x": 1}, "x"),
]


@pytest.mark.parametrize(("fields", "named"), INVALID, ids=lambda v: str(v)[:60])
def test_invalid_embedding_requests(server: LiveServer, fields: dict[str, Any], named: str) -> None:
    reply = server.post(EMBEDDINGS, {"model": "demo", **fields})
    assert reply.status == 400 and reply.error["param"] == named, reply.data


LABELS = ["blue heart", "red heart", "green star"]


def test_classification(server: LiveServer, models: Models, scene: str) -> None:
    assert models.clip is not None
    [expected] = classify(*models.clip, [str(SCENE)], LABELS, cache=False)
    body = {"model": "demo", "input": [scene, {"image": scene}], "labels": LABELS}
    for entry in server.post(CLASSIFY, body).json["data"]:
        assert [p["label"] for p in entry["predictions"]] == [p.label for p in expected]
        scores = [p["score"] for p in entry["predictions"]]
        np.testing.assert_allclose(scores, [p.probability for p in expected], atol=1e-5)
        assert (entry["prediction"], entry["score"]) == (expected[0].label, scores[0])
    best = server.post(CLASSIFY, body | {"top_k": 1, "templates": ["{}"]}).json["data"][0]
    assert len(best["predictions"]) == 1


def test_many_labels_are_embedded_in_batches(server: LiveServer, scene: str) -> None:
    labels = [f"{i} circles" for i in range(70)]
    [entry] = server.post(CLASSIFY, {"model": "demo", "input": scene, "labels": labels}).json[
        "data"
    ]
    assert sorted(p["label"] for p in entry["predictions"]) == sorted(labels)
    assert sum(p["score"] for p in entry["predictions"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "labels"),
        ({"labels": []}, "labels"),
        ({"labels": "cat"}, "labels"),
        ({"labels": [1]}, "labels[0]"),
        ({"labels": ["a", " "]}, "labels[1]"),
        ({"labels": ["a"] * 1001}, "labels"),
        ({"labels": ["a"] * 200, "templates": ["{}"] * 100}, "templates"),
        ({"labels": ["a"], "templates": ["no place"]}, None),
        ({"labels": ["a"], "top_k": 0}, "top_k"),
        ({"labels": ["a"], "input": "a text"}, "input"),
    ],
)
def test_invalid_classification_requests(
    server: LiveServer, scene: str, fields: dict[str, Any], named: str | None
) -> None:
    reply = server.post(CLASSIFY, {"model": "demo", "input": scene, **fields})
    assert reply.status == 400 and reply.error["param"] == named, reply.data


def test_embeddings_do_not_wait_for_running_answers(
    start: Callable[..., LiveServer], models: Models
) -> None:
    """Embeddings are computed between two decoding steps, in the same thread."""
    batch = SlowBatch(step_s=0.05)
    server = start(None, lambda: batch)
    connection = server.connect()
    body = b'{"model":"demo","messages":[{"role":"user","content":"Hi"}],"max_tokens":2000}'
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    server.wait_for("answers_running", 1)
    np.testing.assert_allclose(embed(server, TEXTS), expected_texts(models), atol=1e-6)
    assert len(batch) == 1 and mx.array(1).item() == 1


def test_server_without_mobileclip(start: Callable[..., LiveServer]) -> None:
    server = start(None, SlowBatch)
    server.app._clip_name = None
    reply = server.post(EMBEDDINGS, {"model": "demo", "input": "a"})
    assert reply.status == 400 and "--clip-model" in reply.error["message"]
