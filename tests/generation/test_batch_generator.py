"""Requests in a batch: admission, removal, errors, threads and memory."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic

from mlx_fastvlm import (
    BatchGenerator,
    FastVLM,
    ModelError,
    Processor,
    PromptCache,
    PromptError,
    Request,
    generate,
    generate_batch,
    load,
)
from mlx_fastvlm.generation.batch_cache import BatchKVCache
from mlx_fastvlm.models.kv_cache import STEP, KVCache

IMAGE = np.full((30, 40, 3), 77, np.uint8)
Loaded = tuple[FastVLM, Processor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model without stop tokens: answers end at `max_tokens`."""
    model, processor = load(synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2"))
    processor.tokenizer.stop_ids = frozenset()
    return model, processor


def request(n: int, tokens: int = 6, **options: Any) -> Request:
    return Request("q" * n, max_tokens=tokens, temperature=1.5, seed=n, **options)


def expected(tiny: Loaded, n: int, tokens: int = 6, **options: Any) -> list[int]:
    return generate(*tiny, "q" * n, max_tokens=tokens, temperature=1.5, seed=n, **options).token_ids


def drain(batch: BatchGenerator, tokens: dict[int, list[int]] | None = None) -> dict[int, Any]:
    """Step until the batch is empty; return the tokens of each request."""
    tokens = {} if tokens is None else tokens
    while len(batch):
        take(batch, tokens)
    return tokens


def take(batch: BatchGenerator, tokens: dict[int, list[int]]) -> None:
    for request_id, chunk in batch.step():
        assert chunk.error is None
        tokens.setdefault(request_id, []).append(chunk.token)


def test_one_request_is_admitted_per_step(tiny: Loaded) -> None:
    batch = BatchGenerator(*tiny, max_batch_size=2)
    ids = [batch.add(request(n, tokens)) for n, tokens in ((1, 4), (2, 2), (3, 3))]
    assert len(set(ids)) == 3 and (batch.waiting, batch.running, len(batch)) == (3, 0, 3)
    steps = [batch.step() for _ in range(6)]
    seen = [[(ids.index(i), chunk.finish_reason) for i, chunk in chunks] for chunks in steps]
    assert seen == [
        [(0, None)],
        [(0, None), (1, None)],
        [(0, None), (1, "length")],
        [(0, "length"), (2, None)],
        [(2, None)],
        [(2, "length")],
    ]
    assert len(batch) == 0 and batch.step() == []


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_removal_in_every_state(tiny: Loaded, which: int, after: int) -> None:
    """Remove a waiting, prefilled, running or finished request; the others continue."""
    batch = BatchGenerator(*tiny, max_batch_size=3)
    ids = [batch.add(request(n, 5 + n)) for n in range(4)]
    tokens: dict[int, list[int]] = {}
    for _ in range(after):
        take(batch, tokens)
    size, count = len(batch), len(tokens.get(ids[which], []))
    batch.remove(ids[which])
    assert len(batch) == size - (count < 5 + which)
    batch.remove(ids[which])
    batch.remove(12345)
    drain(batch, tokens)
    for n, request_id in enumerate(ids):
        assert n == which or tokens[request_id] == expected(tiny, n, 5 + n)
    assert tokens.get(ids[which], []) == expected(tiny, which, 5 + which)[:count]
    assert batch._decoder.nbytes == 0


def test_removed_request_frees_its_row_before_the_next_step(tiny: Loaded) -> None:
    batch = BatchGenerator(*tiny, max_batch_size=1)
    first, second = batch.add(request(1)), batch.add(request(2))
    batch.step()
    batch.remove(first)
    assert (batch.waiting, batch.running) == (1, 0)
    assert [request_id for request_id, _ in batch.step()] == [second]


def test_end_at_the_first_token(tiny: Loaded) -> None:
    model, processor = tiny
    stop = processor.tokenizer.decode(expected(tiny, 3, 1))
    requests = [request(3, 9, stop=stop), request(4, 1), request(5, 9)]
    results = generate_batch(model, processor, requests, max_batch_size=2)
    assert [result.finish_reason for result in results] == ["stop", "length", "length"]
    assert results[0].text == "" and results[0].stats.generation_tokens == 1
    assert results[2].token_ids == expected(tiny, 5, 9)


def test_fifty_queued_requests(tiny: Loaded) -> None:
    requests = [request(n % 7, 1 + n % 5) for n in range(50)]
    results = generate_batch(*tiny, requests, max_batch_size=4)
    alone = [expected(tiny, n, 5) for n in range(7)]
    for n, result in enumerate(results):
        assert result.token_ids == alone[n % 7][: 1 + n % 5]


def test_memory_is_bounded_and_freed(tiny: Loaded) -> None:
    """The cache is as long as the longest running sequence, rounded up, and shrinks with it."""
    batch = BatchGenerator(*tiny, max_batch_size=3)
    batch.add(request(5, 9))
    long = batch.add(request(900, 4))
    batch.add(request(6, 8))
    for _ in range(3):
        batch.step()
    token = batch._decoder.nbytes // (3 * 4 * STEP)
    assert token * 3 * 4 * STEP == batch._decoder.nbytes
    batch.remove(long)
    batch.step()
    assert batch._decoder.nbytes == token * 2 * STEP
    drain(batch)
    assert batch._decoder.nbytes == 0


@pytest.mark.parametrize("tokens", [10, STEP + 20])
def test_batch_cache_equals_single_caches(tokens: int) -> None:
    """Rows of different lengths are added and dropped while the buffers grow."""
    rng = np.random.default_rng(0)

    def new(length: int) -> mx.array:
        return mx.array(rng.normal(size=(1, 2, length, 4)).astype(np.float32))

    batch, single = BatchKVCache(), []
    for step in range(tokens):
        if step % 9 == 0 and len(single) < 5:
            single.append(KVCache())
            single[-1].append([new(1 + 37 * step % 300), new(1 + 37 * step % 300)])
            batch.add(single[-1])
        if step % 13 == 12:
            keep = [i for i in range(len(single)) if i != step % len(single)]
            single = [single[i] for i in keep]
            batch.keep(keep)
            if not single:
                continue
        parts = [[new(1), new(1)] for _ in single]
        for cache, part in zip(single, parts, strict=True):
            cache.append(part)
        mask = batch.make_mask(1)
        keys, values = batch.update_and_fetch(*map(mx.concatenate, zip(*parts, strict=True)))
        assert batch.offset.tolist() == [cache.offset for cache in single]
        for row, cache in enumerate(single):
            seen = np.ones(keys.shape[2], bool) if mask is None else np.array(mask[row, 0, 0])
            for ours, theirs in zip((keys, values), cache.first(cache.offset), strict=True):
                assert np.array_equal(np.array(ours[row])[:, seen], np.array(theirs[0]))
            assert mx.array_equal(
                batch.row(row).first(cache.offset)[0], cache.first(cache.offset)[0]
            )


def inject_nan(model: FastVLM, monkeypatch: pytest.MonkeyPatch, passes: int, row: int) -> None:
    call, count = FastVLM.__call__, iter(range(10**6))

    def spy(*args: Any, **kwargs: Any) -> mx.array:
        logits = call(*args, **kwargs)
        if next(count) == passes and row < len(logits):
            logits[row] = mx.nan
        return logits

    monkeypatch.setattr(FastVLM, "__call__", spy)


def test_overflow_ends_one_request_only(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [expected(tiny, n) for n in range(3)]
    inject_nan(tiny[0], monkeypatch, 7, 1)  # after three prefills and four passes
    results = generate_batch(*tiny, [request(n) for n in range(3)])
    assert [results[0].token_ids, results[2].token_ids] == [right[0], right[2]]
    assert results[1].finish_reason == "error" and isinstance(results[1].error, ModelError)
    assert results[1].token_ids == right[1][: len(results[1].token_ids)] and results[1].token_ids


def test_overflow_leaves_no_trace_in_the_prompt_cache(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a batch and for a single answer."""
    for single in (True, False):
        cache, right = PromptCache(), expected(tiny, 30)
        with monkeypatch.context() as patch:
            inject_nan(tiny[0], patch, 3, 0)
            if single:
                with pytest.raises(ModelError, match="not finite"):
                    expected(tiny, 30, prompt_cache=cache)
            else:
                [result] = generate_batch(*tiny, [request(30)], prompt_cache=cache)
                assert result.finish_reason == "error"
        [entry] = cache._entries
        prompt = tiny[1]("q" * 30).input_ids.size
        assert prompt <= len(entry.sequence) <= prompt + 2
        parts = [part for layer in entry.layers for part in layer]
        assert all(mx.all(mx.isfinite(part)).item() for part in parts)
        assert expected(tiny, 30, prompt_cache=cache) == right


def test_failing_prefill_is_reported_alone(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error may be of any type."""
    batch = BatchGenerator(*tiny)
    good, bad = batch.add(request(1)), batch.add(request(2, images=IMAGE))

    def fail(*_: Any) -> Any:
        raise RuntimeError("memory")

    monkeypatch.setattr(FastVLM, "encode_image", fail)
    tokens = [batch.step(), batch.step()]
    assert [request_id for request_id, _ in tokens[1]] == [bad, good]
    chunk = tokens[1][0][1]
    assert (chunk.finish_reason, chunk.token, str(chunk.error)) == ("error", -1, "memory")
    assert len(batch) == 1
    rest = [chunk.token for chunks in tokens for i, chunk in chunks if i == good]
    assert rest + drain(batch)[good] == expected(tiny, 1)


@pytest.mark.parametrize("error", [RuntimeError("memory"), KeyboardInterrupt()])
def test_failing_step_ends_only_running_requests(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    batch = BatchGenerator(*tiny, max_batch_size=2)
    ids = [batch.add(request(n)) for n in range(3)]
    batch.step()
    batch.step()

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(BatchKVCache, "update_and_fetch", fail)
        if isinstance(error, Exception):
            chunks = batch.step()
            assert [(i, chunk.error) for i, chunk in chunks] == [(i, error) for i in ids[:2]]
        else:
            with pytest.raises(KeyboardInterrupt):
                batch.step()
    assert (batch.waiting, batch.running) == (1, 0)
    assert drain(batch) == {ids[2]: expected(tiny, 2)}


def test_two_batches_at_once(tiny: Loaded) -> None:
    batches = [BatchGenerator(*tiny, max_batch_size=2) for _ in range(2)]
    ids = [[batch.add(request(n + k)) for n in range(3)] for k, batch in enumerate(batches)]
    tokens: list[dict[int, list[int]]] = [{}, {}]
    while any(map(len, batches)):
        for batch, taken in zip(batches, tokens, strict=True):
            take(batch, taken)
    for k in range(2):
        assert [tokens[k][i] for i in ids[k]] == [expected(tiny, n + k) for n in range(3)]


def test_threads(tiny: Loaded) -> None:
    """Several threads step, while others add and remove requests."""
    batch, taken = BatchGenerator(*tiny, max_batch_size=3), {}
    wanted: dict[int, int] = {}
    added = threading.Event()

    def step() -> None:
        while len(batch) or not added.is_set():
            for request_id, chunk in batch.step():
                assert chunk.error is None
                taken.setdefault(request_id, []).append(
                    (chunk.stats.generation_tokens, chunk.token)
                )

    def add(first: int) -> None:
        for n in range(first, first + 6):
            wanted[batch.add(request(n, 4))] = n
            unwanted = batch.add(request(n, 50))
            batch.remove(unwanted)

    with ThreadPoolExecutor(5) as pool:
        steps = [pool.submit(step) for _ in range(3)]
        for adding in [pool.submit(add, first) for first in (0, 6)]:
            adding.result()
        added.set()
        for future in steps:
            future.result()
    for request_id, n in wanted.items():
        assert [token for _, token in sorted(taken[request_id])] == expected(tiny, n, 4)


def test_only_requests_are_accepted(tiny: Loaded) -> None:
    for wrong in ("q", None, {"prompt": "q"}):
        with pytest.raises(PromptError, match="a request must be a Request, not a"):
            BatchGenerator(*tiny).add(wrong)
        with pytest.raises(PromptError, match="a request must be a Request, not a"):
            generate_batch(*tiny, [request(1), wrong])
