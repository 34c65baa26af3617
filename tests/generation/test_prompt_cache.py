"""Keys and values reused from an earlier prompt equal recomputed ones."""

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
from tolerances import KV_8BIT, REUSED, relative_error

from mlx_fastvlm import FastVLM, Processor, PromptCache, generate, load, stream_generate
from mlx_fastvlm.generation.stream import Result
from mlx_fastvlm.models.config import Qwen2Config
from mlx_fastvlm.models.qwen2 import Qwen2

A, B, C = (np.full((30, 40, 3), value, np.uint8) for value in (30, 120, 220))
SCENE = Path(__file__).parents[2] / "examples" / "scene.png"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[FastVLM, Processor]:
    return load(synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2"))


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[mx.array]:
    """Record the logits of the last position in every forward pass."""
    seen: list[mx.array] = []
    call = FastVLM.__call__

    def spy(*args: Any, **kwargs: Any) -> mx.array:
        seen.append(call(*args, **kwargs)[0, -1])
        return seen[-1][None, None]

    monkeypatch.setattr(FastVLM, "__call__", spy)
    return seen


def assert_warm_equals_cold(
    tiny: tuple[FastVLM, Processor],
    logits: list[mx.array],
    cache: PromptCache,
    *question: Any,
    tolerance: float = REUSED,
    **options: Any,
) -> Result:
    """Ask with and without the cache; tokens must be equal and the logits of each pass close."""
    options = {"max_tokens": 6, **options}
    logits.clear()
    cold = generate(*tiny, *question, **options)
    passes = len(logits)
    warm = generate(*tiny, *question, prompt_cache=cache, **options)
    assert warm.token_ids == cold.token_ids and len(logits) == 2 * passes
    for one, other in zip(logits[:passes], logits[passes:], strict=True):
        assert relative_error(other, one) < tolerance
    return warm


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("junk", [0, 9])
def test_copied_prefix_is_bit_equal(bits: int | None, batch: int, junk: int) -> None:
    """Copying the first 30 positions rounds nothing again, whatever follows them."""
    mx.random.seed(0)
    model = Qwen2(Qwen2Config(128, 2, 4, 2, 96, 300, 1e-6, 1e6, 4096, True))
    ids = mx.random.randint(0, 250, (batch, 40), key=mx.random.key(batch))
    uninterrupted, longer, warm = (model.make_cache(8, bits) for _ in range(3))
    model(ids[:, :30], uninterrupted)
    expected = model(ids[:, 30:], uninterrupted)
    model(ids[:, :30], longer)
    if junk:
        model(ids[:, :junk], longer)
    for source, target in zip(longer, warm, strict=True):
        target.append(source.first(30))
    if junk:  # later use of the first cache must not change the copy
        for layer in longer:
            layer.trim(junk + 20)
        model(ids[:, 3 : 3 + junk], longer)
    assert [layer.size() for layer in warm] == [30] * len(warm)
    assert mx.array_equal(model(ids[:, 30:], warm), expected).item()


def test_second_question_reuses_the_image(
    tiny: tuple[FastVLM, Processor], logits: list[mx.array]
) -> None:
    cache = PromptCache()
    first = assert_warm_equals_cold(tiny, logits, cache, "the cat", A)
    assert first.stats.cached_tokens == 0
    second = assert_warm_equals_cold(tiny, logits, cache, "a dog", A)
    ids = [tiny[1].prepare(text, A)[0] for text in ("the cat", "a dog")]
    common = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    assert second.stats.cached_tokens == common > ids[0].index(-200) + 16
    same = assert_warm_equals_cold(tiny, logits, cache, "a dog", A)
    assert same.stats.cached_tokens == same.stats.prompt_tokens - 1


def test_conversation_reuses_its_last_answer(logits: list[mx.array]) -> None:
    demo = load("demo")
    cache = PromptCache()
    messages: list[dict[str, str]] = []
    known = 0
    for question in ("How many circles are there?", "What colour is the square?", "Is it red?"):
        messages.append({"role": "user", "content": question})
        options = {"max_tokens": 30}
        answer = assert_warm_equals_cold(demo, logits, cache, messages, SCENE, **options)
        assert answer.finish_reason == "stop" and answer.stats.cached_tokens == known
        messages.append({"role": "assistant", "content": answer.text})
        known = answer.stats.prompt_tokens + len(answer.token_ids)


@pytest.mark.parametrize(
    ("images", "shared"),
    [([A, C], 1), ([C, B], 0), ([B, A], 0), ([A, A], 1), ([A], 1), ([A, B, C], 2), ([A, B], 2)],
)
def test_reuse_ends_at_the_first_different_image(
    images: list[Any], shared: int, tiny: tuple[FastVLM, Processor], logits: list[mx.array]
) -> None:
    cache = PromptCache()
    assert_warm_equals_cold(tiny, logits, cache, "the cat", [A, B])
    answer = assert_warm_equals_cold(tiny, logits, cache, "the cat", images)
    start = tiny[1].prepare("the cat", A)[0].index(-200)
    cached = answer.stats.cached_tokens
    assert start + 17 * shared <= cached < start + 17 * (shared + 1)


def test_system_prompt_is_reused(tiny: tuple[FastVLM, Processor], logits: list[mx.array]) -> None:
    cache, system = PromptCache(), {"system": "in the the the and and in in"}
    assert_warm_equals_cold(tiny, logits, cache, "the cat", A, **system)
    assert_warm_equals_cold(tiny, logits, cache, "the cat", B)
    answer = assert_warm_equals_cold(tiny, logits, cache, "a", **system)
    turn = tiny[1].prepare("", **system)[0]
    assert (
        answer.stats.cached_tokens == len(turn) - len(tiny[1].tokenizer.encode("assistant\n")) - 3
    )


def test_quantized_keys_and_values_are_reused(logits: list[mx.array]) -> None:
    demo, cache = load("demo"), PromptCache()
    circles, square = "How many circles are there?", "What colour is the square?"

    def cached(question: str, **options: Any) -> int:
        options = {"tolerance": KV_8BIT, **options}
        return assert_warm_equals_cold(
            demo, logits, cache, question, SCENE, **options
        ).stats.cached_tokens

    assert cached(circles, kv_bits=8) == 0 < cached(square, kv_bits=8)
    # Float entries do not serve a quantised cache, nor quantised ones a float cache.
    assert cached(square) == 0 < cached(circles, kv_bits=8)


def test_other_resolution_or_weights_are_not_reused(tmp_path: Path) -> None:
    model, processor = load(synthetic.write_layout(tmp_path, "llava_qwen2"))
    cache = PromptCache()

    def cached(**options: Any) -> int:
        options = {"max_tokens": 2, "prompt_cache": cache, **options}
        return generate(model, processor, "a", A, **options).stats.cached_tokens

    assert cached() == 0 < cached()
    assert cached(resolution=320) < processor.prepare("a", A)[0].index(-200) + 16
    norm = model.language_model.norm
    norm.weight = norm.weight * 2
    assert cached() == 0 < cached()


def test_memory_is_bounded_by_max_bytes(tiny: tuple[FastVLM, Processor]) -> None:
    cache = PromptCache(max_bytes=0)

    def cached(image: Any) -> int:
        options = {"max_tokens": 2, "prompt_cache": cache}
        return generate(*tiny, "a", image, **options).stats.cached_tokens

    assert [cached(A), cached(A)] == [0, 0] and not cache._entries
    cache = PromptCache()
    cached(A)
    (entry,) = cache._entries
    cache = PromptCache(max_bytes=2 * entry.nbytes)
    for image in (A, B, A, C):
        cached(image)
    assert len(cache._entries) == 2 and sum(e.nbytes for e in cache._entries) <= cache.max_bytes
    start = tiny[1].prepare("a", A)[0].index(-200)
    assert cached(A) > start >= cached(B)  # B was dropped for C


def test_longer_prompt_replaces_its_prefix(tiny: tuple[FastVLM, Processor]) -> None:
    cache = PromptCache()
    for _ in range(3):
        generate(*tiny, "a", A, max_tokens=3, prompt_cache=cache)
    assert len(cache._entries) == 1


def test_interrupted_answer_is_reused_in_other_threads(tiny: tuple[FastVLM, Processor]) -> None:
    cache = PromptCache()
    expected = generate(*tiny, "the cat", A, max_tokens=6).token_ids
    stream = stream_generate(*tiny, "the cat", A, max_tokens=6, prompt_cache=cache)
    next(stream)
    next(stream)
    stream.close()
    answers: list[Result] = []

    def ask() -> None:
        answers.append(generate(*tiny, "the cat", A, max_tokens=6, prompt_cache=cache))

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert [answer.token_ids for answer in answers] == [expected] * 2
    assert answers[0].stats.cached_tokens == answers[0].stats.prompt_tokens - 1
