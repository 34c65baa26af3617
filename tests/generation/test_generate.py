"""Generation: streaming, stopping, sampling, errors."""

import threading
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic

from mlx_fastvlm import (
    FastVLM,
    ModelError,
    Processor,
    PromptCache,
    PromptError,
    generate,
    load,
    stream_generate,
)
from mlx_fastvlm.generation.sampling import BLOCK, BLOCKS, Sampler, Sampling, _top_p_threshold

IMAGE = np.full((30, 40, 3), 77, np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[FastVLM, Processor]:
    return load(synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2"))


class Scripted:
    """A model that emits given tokens in turn, to test the loop alone."""

    _group = None  # one process

    def __init__(self, ids: list[int], vocab_size: int = 300, fill: float = 0.0):
        self.ids, self.vocab_size, self.fill = ids, vocab_size, fill
        self.calls: list[tuple[int, bool]] = []

    def make_cache(self, capacity: int, bits: int | None = None) -> list[Any]:
        return []

    def embed(self, ids: mx.array, features: mx.array | None = None) -> mx.array:
        return mx.zeros((*ids.shape, 1))

    def __call__(self, ids: mx.array, cache: Any, embeddings: Any, *, last_only: bool) -> mx.array:
        step = len(self.calls)
        self.calls.append((ids.size, last_only))
        logits = np.full((1, 1, self.vocab_size), self.fill, np.float32)
        logits[0, 0, self.ids[step % len(self.ids)]] += 5
        return mx.array(logits)


def scripted(processor: Processor, text: str, end: str | None = "<|im_end|>") -> Any:
    tokenizer = processor.tokenizer
    return Scripted(tokenizer.encode(text) + ([tokenizer.added[end]] if end else []))


def answer(processor: Processor, text: str, **options: Any) -> Any:
    return generate(scripted(processor, text), processor, "q", **options)


def test_prefill_is_one_pass_and_computes_one_row(tiny: tuple[FastVLM, Processor]) -> None:
    model = scripted(tiny[1], "hello")
    result = generate(model, tiny[1], "q")
    assert result.text == "hello" and result.finish_reason == "stop"
    lengths = [length for length, _ in model.calls]
    assert lengths[0] == result.stats.prompt_tokens and set(lengths[1:]) == {1}
    assert all(last_only for _, last_only in model.calls)
    assert len(lengths) <= result.stats.generation_tokens + 1


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_both_end_tokens_end_the_answer(tiny: tuple[FastVLM, Processor], end: str) -> None:
    result = generate(scripted(tiny[1], "in the", end), tiny[1], "q")
    assert result.text == "in the" and result.finish_reason == "stop"
    assert result.token_ids == tiny[1].tokenizer.encode("in the")


def test_max_tokens_ends_the_answer(tiny: tuple[FastVLM, Processor]) -> None:
    result = answer(tiny[1], "abcdef", max_tokens=4)
    assert (result.text, result.finish_reason) == ("abcd", "length")
    assert result.stats.generation_tokens == 4


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("dog", "the cat and "),
        (["zebra", "cat"], "the "),
        (" and dog", "the cat"),
        ("dogs", "the cat and dog"),
        (["og", "dog"], "the cat and "),
        ("t", ""),
    ],
)
def test_stop_texts_across_tokens(tiny: tuple[FastVLM, Processor], stop: Any, text: str) -> None:
    chunks = list(stream_generate(scripted(tiny[1], "the cat and dog"), tiny[1], "q", stop=stop))
    assert "".join(chunk.text for chunk in chunks) == text
    assert chunks[-1].finish_reason == "stop"
    streamed = ""
    for chunk in chunks:  # no chunk contains what a stop text removes later
        streamed += chunk.text
        assert text.startswith(streamed)


def test_multibyte_characters_are_not_split(tiny: tuple[FastVLM, Processor]) -> None:
    text = "née 日本 👩‍👧"
    chunks = list(stream_generate(scripted(tiny[1], text), tiny[1], "q"))
    assert "".join(chunk.text for chunk in chunks) == text
    assert not any("�" in chunk.text for chunk in chunks)
    cut = generate(scripted(tiny[1], "né"), tiny[1], "q", max_tokens=2)
    assert cut.text == "n�"


def test_streamed_equals_whole(tiny: tuple[FastVLM, Processor]) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.5, "seed": 3}
    whole = generate(*tiny, "the", IMAGE, **options)
    chunks = list(stream_generate(*tiny, "the", IMAGE, **options))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.token for chunk in chunks][: len(whole.token_ids)] == whole.token_ids


def test_greedy_equals_recomputation_without_cache(tiny: tuple[FastVLM, Processor]) -> None:
    """Each token is the argmax over the whole sequence so far, computed without a cache."""
    model, processor = tiny
    inputs = processor("in", IMAGE)
    assert inputs.pixels is not None
    features = model.encode_image(inputs.pixels)
    ids = np.array(inputs.input_ids).tolist()
    expected = []
    for _ in range(10):
        logits = model(mx.array([ids]), None, model.embed(mx.array([ids]), features))[0, -1]
        expected.append(int(mx.argmax(logits[: processor.tokenizer.size]).item()))
        ids.append(expected[-1])
    assert generate(*tiny, "in", IMAGE, max_tokens=10).token_ids == expected


def test_ids_beyond_the_tokenizer_are_never_sampled(tiny: tuple[FastVLM, Processor]) -> None:
    model = Scripted([290], vocab_size=300)
    options = {"max_tokens": 50, "temperature": 1.0, "seed": 1}
    result = generate(model, tiny[1], "q", **options)
    assert all(token < tiny[1].tokenizer.size for token in result.token_ids)


def test_statistics(tiny: tuple[FastVLM, Processor]) -> None:
    images = [IMAGE + 1, IMAGE + 2]  # not cached yet
    stats = generate(*tiny, "hi", images, max_tokens=5).stats
    assert stats.image_tokens == 32
    assert stats.prompt_tokens == tiny[1]("hi", images).input_ids.size
    parts = stats.preprocess_s + stats.vision_s + stats.prefill_s
    assert abs(stats.ttft_s - parts) < 1e-6 and min(stats.vision_s, stats.prefill_s) > 0
    assert stats.peak_memory_bytes > 0 and stats.decode_tokens_per_s > 0


def test_non_finite_values_are_errors(tiny: tuple[FastVLM, Processor], tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ModelError, match="logits are not finite; download the checkpoint"):
            generate(Scripted([5], fill=bad), tiny[1], "q")
    model, processor = load(synthetic.write_layout(tmp_path, "llava_qwen2"))
    model.vision_tower.stem.conv_bias = mx.full((8,), mx.inf)
    with pytest.raises(ModelError, match="image tower overflowed in float32; its weights"):
        generate(model, processor, "q", IMAGE)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 10_000},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": ""},
        {"stop": ["a", ""]},
    ],
)
def test_options_out_of_range_are_refused(
    tiny: tuple[FastVLM, Processor], options: dict[str, Any]
) -> None:
    with pytest.raises(PromptError):
        generate(*tiny, "q", **options)


def test_full_context_is_refused(tiny: tuple[FastVLM, Processor]) -> None:
    rest = tiny[1].max_length - tiny[1]("").input_ids.size
    with pytest.raises(PromptError, match="leaves no room for an answer"):
        generate(*tiny, "1" * rest)


def test_stream_can_move_between_threads(tiny: tuple[FastVLM, Processor]) -> None:
    """As in a server that takes each chunk in whichever thread is free."""
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "repetition_penalty": 1.3}
    alone = [c.token for c in stream_generate(*tiny, "the", IMAGE, seed=1, **options)]
    stream = stream_generate(*tiny, "the", IMAGE, seed=1, **options)
    taken: list[Any] = []
    for _ in alone:
        thread = threading.Thread(target=lambda: taken.append(next(stream)))
        thread.start()
        thread.join()
    assert [chunk.token for chunk in taken] == alone


def test_same_seed_same_answer(tiny: tuple[FastVLM, Processor]) -> None:
    def draw(seed: int | None) -> list[int]:
        options = {"max_tokens": 20, "temperature": 2.0, "seed": seed}
        return generate(*tiny, "q", **options).token_ids

    assert draw(1) == draw(1) != draw(2)
    before = mx.random.state[0].tolist()
    assert draw(None) != draw(None)
    assert mx.random.state[0].tolist() == before  # the caller's generator is unchanged


# The sampler's distribution against NumPy


def sample_frequencies(
    sampling: Sampling, logits: np.ndarray, prompt: list[int], n: int = 1500
) -> np.ndarray:
    sampler = Sampler(sampling, logits.size, prompt)
    tokens = [sampler._sample(mx.array(logits)) for _ in range(n)]
    return np.bincount(np.array(mx.stack(tokens)), minlength=logits.size) / n


def filtered(sampling: Sampling, logits: np.ndarray) -> np.ndarray:
    """Probabilities by transformers' definitions, in float64."""
    x = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        x = np.where(x < np.sort(x)[-sampling.top_k], -np.inf, x)
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    if sampling.top_p < 1:
        p[order[before >= sampling.top_p]] = 0
    if sampling.min_p:
        p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.3},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7},
    ],
)
def test_sampler_draws_from_the_right_distribution(options: dict[str, Any]) -> None:
    logits = np.array([1.0, 2.0, -1.0, 0.5, 2.5, 0.0, 1.5, -3.0], np.float32)
    sampling = Sampling(**{"temperature": 1.0, "seed": 0, **options})
    expected = filtered(sampling, logits) if sampling.top_p else np.eye(8)[4]
    observed = sample_frequencies(sampling, logits, [])
    assert np.all((observed > 0) <= (expected > 0))
    assert np.abs(observed - expected).max() < 0.06


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.5, 4.0, 12.0])
def test_top_p_of_many_tokens_without_sorting_them(
    top_p: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of largest logits give the same threshold as all, or report it undecided."""
    logits = np.random.default_rng(0).normal(0, spread, 151_646).astype(np.float32)
    p = np.exp(logits.astype(np.float64) - logits.max())
    ranked = np.sort(p / p.sum())[::-1]
    kept = max(1, int(np.sum(np.cumsum(ranked) - ranked < top_p)))
    sorted_sizes: list[int] = []
    sort, partition = mx.sort, mx.argpartition
    monkeypatch.setattr(mx, "sort", lambda x: sorted_sizes.append(x.size) or sort(x))
    monkeypatch.setattr(
        mx, "argpartition", lambda x, k: sorted_sizes.append(x.size) or partition(x, k)
    )
    least, decided = _top_p_threshold(mx.array(logits), top_p, full_sort=False)
    assert max(sorted_sizes) <= BLOCKS * BLOCK
    assert decided.item() if kept <= BLOCKS else kept <= BLOCKS * BLOCK or not decided.item()
    if decided.item():
        # Sums in float32 may keep a token more or less where p is reached in the far tail.
        assert abs(np.sum(logits >= least.item()) - kept) <= 1e-3 * kept
    assert _top_p_threshold(mx.array(logits), top_p, full_sort=True)[1].item()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_undecided_token_is_sampled_again(
    penalty: float, tiny: tuple[FastVLM, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "top_p": 0.95, "seed": 1, "max_tokens": 12}
    options["repetition_penalty"] = penalty
    sampler = "mlx_fastvlm.generation.sampling"
    expected = generate(*tiny, "the", IMAGE, **options).token_ids
    flags: list[bool] = []
    original = _top_p_threshold

    def spy(*args: Any, **kwargs: Any) -> Any:
        flags.append(bool(original(*args, **kwargs)[1].item()))
        return original(*args, **kwargs)

    monkeypatch.setattr(f"{sampler}.BLOCKS", 2)
    monkeypatch.setattr(f"{sampler}.BLOCK", 4)
    monkeypatch.setattr(f"{sampler}._top_p_threshold", spy)
    assert generate(*tiny, "the", IMAGE, **options).token_ids == expected
    assert not flags[0] and all(flags[2:])  # undecided: only the first and the one queued with it


def test_repetition_penalty_follows_its_formula() -> None:
    logits = mx.array([2.0, 1.9, -1.0, -1.1])
    sampler = Sampler(Sampling(repetition_penalty=2.0), 4, [0, -200, 99])
    assert sampler(logits).item() == 1  # 2.0 / 2 = 1.0 < 1.9
    assert sampler(logits).item() == 0  # now both are halved: 1.0 > 0.95
    only_negative = mx.array([-1.0, -1.5, -9.0, -9.0])
    assert Sampler(Sampling(repetition_penalty=2.0), 4, [0])(only_negative).item() == 1


@pytest.mark.parametrize(("value", "overflows"), [(2e4, False), (6e4, True)])
def test_tower_that_overflows_in_half_precision_runs_in_float32(
    tmp_path: Path, value: float, overflows: bool
) -> None:
    """It warns, the answer is that of float32, and the embeddings are cached as usual."""
    synthetic.write_layout(tmp_path, "llava_qwen2")
    answers = []
    for dtype in (mx.float16, mx.float32):
        model, processor = load(tmp_path, dtype=dtype)
        model.vision_tower.stem.conv_bias = mx.full((8,), value, dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first = generate(
                model, processor, "the", IMAGE, max_tokens=4, prompt_cache=PromptCache()
            )
            again = generate(model, processor, "the", IMAGE, max_tokens=4)
        warned = ["run again in float32" in str(warning.message) for warning in caught]
        assert warned == ([True] if dtype == mx.float16 and overflows else [])
        assert again.token_ids == first.token_ids
        assert model.vision_tower.stem.conv_bias.dtype == dtype
        answers.append(first.token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_kv_cache(bits: int) -> None:
    """With 8 bits the demo answers as with floats; with 4 bits it still answers."""
    model, processor = load("demo")
    image = Path(__file__).parents[2] / "examples" / "scene.png"
    question = "How many circles are there?"
    plain = generate(model, processor, question, image)
    quantized = generate(model, processor, question, image, kv_bits=bits)
    assert quantized.text.startswith("There are ")
    assert bits == 4 or quantized.token_ids == plain.token_ids
