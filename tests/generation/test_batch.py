"""Batched answers equal those of `generate`."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic

from mlx_fastvlm import (
    BatchGenerator,
    FastVLM,
    ImageCache,
    ImageError,
    ModelError,
    Processor,
    PromptCache,
    PromptError,
    Request,
    Result,
    generate,
    generate_batch,
    load,
)
from mlx_fastvlm.generation.batch_cache import BatchKVCache
from mlx_fastvlm.models.fastvlm import IMAGE_TOKEN

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
A, B = (np.full((30, 40, 3), value, np.uint8) for value in (30, 220))
TIE = 1e-4  # logits that differ by less may be ranked either way
Loaded = tuple[FastVLM, Processor]
answers: dict[Request, Result] = {}  # of `generate`; each request is used with one model only


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2"))


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load("demo")


def options(request: Request) -> dict[str, Any]:
    return {n: getattr(request, n) for n in Request.__slots__ if n != "logprobs"}


def alone(loaded: Loaded, request: Request) -> Result:
    if request not in answers:
        answers[request] = generate(*loaded, **options(request))
    return answers[request]


def margins(loaded: Loaded, request: Request, tokens: list[int]) -> np.ndarray:
    """Difference of the two largest logits at each token, in one pass without a cache."""
    model, processor = loaded
    inputs = processor(request.prompt, request.images, system=request.system)
    ids = mx.array([[*inputs.input_ids.tolist(), *tokens]])
    features = None if inputs.pixels is None else model.encode_image(inputs.pixels)
    logits = np.array(model(ids, None, model.embed(ids, features))[0, inputs.input_ids.size - 1 :])
    best = np.sort(logits[:, : processor.tokenizer.size])[:, -2:]
    return best[:, 1] - best[:, 0]


def assert_same(loaded: Loaded, request: Request, result: Result) -> None:
    """Check equality with `generate`, up to the first token whose two best logits tie."""
    expected = alone(loaded, request)
    one, other = result.token_ids, expected.token_ids
    if one == other:
        assert (result.text, result.finish_reason) == (expected.text, expected.finish_reason)
        assert result.stats.generation_tokens == expected.stats.generation_tokens
        assert result.error is None
        return
    first = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    assert first is not None and request.temperature == 0, (result, expected)
    assert margins(loaded, request, other)[first] <= TIE, (result, expected)


def assert_all_same(loaded: Loaded, requests: list[Request], **given: Any) -> list[Result]:
    results = generate_batch(*loaded, requests, **given)
    assert len(results) == len(requests)
    for request, result in zip(requests, results, strict=True):
        assert_same(loaded, request, result)
    return results


MIXED = [
    Request("How many circles are there?", SCENE),
    Request("What is this?", max_tokens=3),
    Request("Describe the image.", SCENE, max_tokens=40),
    Request("word " * 300, max_tokens=9),
    Request("Compare them.", [A, SCENE, B], max_tokens=12),
    Request("", max_tokens=1),
    Request("What colour is the square?", SCENE, system="Be brief."),
    Request("Describe the image.", B, resolution=128, image_mode="crop", max_tokens=20),
    Request("Describe the image.", SCENE, temperature=1.0, seed=3, max_tokens=25),
    Request("Describe the image.", SCENE, temperature=1.0, seed=4, max_tokens=25),
    Request("the", A, temperature=2.0, seed=5, top_p=0.9, max_tokens=15),
    Request("the", temperature=1.5, seed=6, top_k=4, min_p=0.05, max_tokens=15),
    Request("Describe the image.", SCENE, repetition_penalty=1.5, max_tokens=15),
    Request("Describe the image.", SCENE, stop=["are", "is"]),
]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_mixed_requests(demo: Loaded, size: int) -> None:
    """Mixed lengths, text, one or several images, sampling and stop texts in one batch."""
    assert_all_same(demo, MIXED, max_batch_size=size)


def test_mixed_requests_with_random_weights(tiny: Loaded) -> None:
    requests = [
        Request("q" * n, [A] * (n % 3), max_tokens=3 + 5 * n, temperature=n % 2, seed=n)
        for n in range(8)
    ]
    results = assert_all_same(tiny, requests, max_batch_size=5)
    assert len({tuple(result.token_ids) for result in results}) > 4  # so that mix-ups show


def test_padding_does_not_change_logits(demo: Loaded) -> None:
    """The decoder alone, on rows of very different lengths."""
    model, processor = demo
    rng, lengths = np.random.default_rng(0), [5, 17, 600, 64, 2]
    ids = rng.integers(0, processor.tokenizer.size, (len(lengths), max(lengths) + 4))
    singles, batch = [], [BatchKVCache() for _ in model.layers]
    for row, length in zip(ids.tolist(), lengths, strict=True):
        singles.append(model.make_cache(length))
        mx.eval(model(mx.array([row[:length]]), singles[-1], last_only=True))
        for layer, single in zip(batch, singles[-1], strict=True):
            layer.add(single)
    for step in range(4):
        new = mx.array([[row[n + step]] for row, n in zip(ids.tolist(), lengths, strict=True)])
        together = model(new, batch, last_only=True)
        for i, single in enumerate(singles):
            alone = model(new[i : i + 1], single, last_only=True)
            assert mx.max(mx.abs(together[i] - alone[0])).item() < TIE / 2


def test_very_long_and_very_short_prompts(demo: Loaded) -> None:
    long = Request("7" * 1500, max_tokens=30)
    short = [Request("Hi", max_tokens=2), Request("What is this?", SCENE)]
    assert_all_same(demo, [short[0], long, *short, short[1]], max_batch_size=3)


def test_constraints(demo: Loaded) -> None:
    pytest.importorskip("llguidance", reason="pip install llguidance, the extra schema")
    schema = {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"enum": [1, 2, 3]}},
        "required": ["shape", "count"],
        "additionalProperties": False,
    }
    requests = [
        Request("What is this?", SCENE, schema=schema),
        Request("How many circles are there?", SCENE),
        Request("Colour?", SCENE, choice=["red", "green", "dark blue"], temperature=1.0, seed=1),
        Request("Describe.", regex="[a-c]{40}", temperature=1.0, seed=2),
        Request("Describe.", regex="[a-c]{40}", temperature=1.0, seed=2, max_tokens=7),
        Request("Describe the image.", SCENE, temperature=1.0, seed=9),
    ]
    results = assert_all_same(demo, requests, max_batch_size=4)
    assert set(json.loads(results[0].text)) == {"shape", "count"}
    assert results[2].text in ("red", "green", "dark blue")
    assert [result.finish_reason for result in results[2:5]] == ["stop", "stop", "length"]


def test_undecided_tokens_are_sampled_again(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-p needs a full sort in some rows, while others have already continued."""
    monkeypatch.setattr("mlx_fastvlm.generation.sampling.BLOCKS", 2)
    monkeypatch.setattr("mlx_fastvlm.generation.sampling.BLOCK", 4)
    requests = [
        Request("the", A, temperature=2.0, top_p=0.95, seed=1, max_tokens=9),
        Request("in", temperature=1.0, repetition_penalty=1.3, seed=2, max_tokens=9),
        Request("of", temperature=2.0, top_p=0.9, seed=3, max_tokens=9),
        Request("a", max_tokens=9),
    ]
    assert_all_same(tiny, requests)


def test_log_probabilities(demo: Loaded) -> None:
    model, processor = demo
    request = Request("How many circles are there?", SCENE, logprobs=3)
    batch = BatchGenerator(model, processor)
    batch.add(Request("Describe the image.", max_tokens=5))
    key = batch.add(request)
    chunks = [chunk for _ in range(30) for i, chunk in batch.step() if i == key]
    tokens = [chunk.token for chunk in chunks]
    inputs = processor(request.prompt, request.images)
    ids = mx.array([[*inputs.input_ids.tolist(), *tokens[:-1]]])
    features = model.encode_image(inputs.pixels)
    logits = np.array(model(ids, None, model.embed(ids, features))[0], np.float64)
    logits = logits[inputs.input_ids.size - 1 :, : processor.tokenizer.size]
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for chunk, row in zip(chunks, expected, strict=True):
        assert chunk.logprob == pytest.approx(row[chunk.token], abs=1e-3)
        assert [i for i, _ in chunk.top_logprobs] == np.argsort(-row)[:3].tolist()
        for i, value in chunk.top_logprobs:
            assert value == pytest.approx(row[i], abs=1e-3)
    for wrong in (21, -1, True, 1.0, "3"):
        with pytest.raises(PromptError, match=r"logprobs is .*; it must be 0 to 20"):
            batch.add(Request("q", logprobs=wrong))
    batch.add(Request("q", logprobs=0, max_tokens=1))
    [(_, chunk)] = batch.step()
    assert chunk.logprob is not None and chunk.top_logprobs == ()


def test_image_and_prompt_caches(demo: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is encoded once, and shared prefixes are computed once, also within a batch."""
    encoded: list[int] = []
    encode = FastVLM.encode_image
    monkeypatch.setattr(FastVLM, "encode_image", lambda *a: encoded.append(1) or encode(*a))
    caches = {"image_cache": ImageCache(), "prompt_cache": PromptCache()}
    questions = ["How many circles are there?", "What colour is the square?", "Describe."]
    message = [{"type": "image", "image": SCENE}]
    requests = [
        Request([{"role": "user", "content": [*message, {"type": "text", "text": question}]}])
        for question in questions
    ]
    results = generate_batch(*demo, requests, **caches)
    assert len(encoded) == 1
    known = [result.stats.cached_tokens for result in results]
    assert known[0] == 0 and min(known[1:]) > results[0].stats.image_tokens
    again = assert_all_same(demo, requests, **caches)  # `generate` uses the default image cache
    assert [r.token_ids for r in again] == [r.token_ids for r in results]
    assert all(r.stats.cached_tokens == r.stats.prompt_tokens - 1 for r in again)
    history = [
        *requests[0].prompt,
        {"role": "assistant", "content": results[0].text},
        {"role": "user", "content": "Why?"},
    ]
    [turn] = generate_batch(*demo, [Request(history, max_tokens=3)], **caches)
    assert turn.stats.cached_tokens > results[0].stats.prompt_tokens  # the answer is cached too
    assert_same(demo, Request(history, max_tokens=3), turn)
    assert IMAGE_TOKEN not in turn.token_ids


def test_errors_affect_only_their_request(demo: Loaded) -> None:
    damaged = SCENE.read_bytes()[:2000]
    requests = [
        Request("How many circles are there?", SCENE),
        Request("q", "missing.png"),
        Request("q", damaged),
        Request("q", temperature=-1),
        Request("q", max_tokens=100_000),
        Request("Describe the image.", SCENE, max_tokens=20),
    ]
    results = generate_batch(*demo, requests, max_batch_size=2)
    for index in (0, 5):
        assert_same(demo, requests[index], results[index])
    for result in results[1:5]:
        assert (result.finish_reason, result.text, result.token_ids) == ("error", "", [])
    kinds = [type(result.error) for result in results[1:5]]
    assert kinds == [ImageError, ImageError, PromptError, PromptError]
    batch = BatchGenerator(*demo)
    for request in (requests[1], *requests[3:5]):  # raised by `add`
        with pytest.raises(ModelError):
            batch.add(request)
    assert len(batch) == 0 and batch.step() == []
    with pytest.raises(ModelError, match="kv_bits is for single answers"):
        batch.add(Request("q", kv_bits=8))
    for size in (0, -1, 1.5, True, "8", None):
        with pytest.raises(ModelError, match="max_batch_size is "):
            BatchGenerator(*demo, max_batch_size=size)


def test_no_requests(demo: Loaded) -> None:
    assert generate_batch(*demo, []) == []
