"""Time the overhead of constrained generation, for a vocabulary of 151,936 tokens."""

import argparse
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.generation.constrained_loop import (
    ConstrainedDecoder,
    ConstrainedSampler,
    Matcher,
    vocabulary,
)
from mlx_fastvlm.generation.constraints import Constraint
from mlx_fastvlm.generation.grammar_check import find_problem
from mlx_fastvlm.generation.sampling import Sampler, Sampling
from mlx_fastvlm.generation.token_loop import Decoder
from mlx_mobileclip.device import default_dtype

from . import models
from .record import table

VOCABULARY = 151_936
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPT, TOKENS = 300, 24
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "kind": {"enum": ["red", "green", "blue"]},
        "mail": {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.com$"},
        "share": {"type": "number"},
    },
    "required": ["name", "age", "tags", "kind", "mail", "share"],
    "additionalProperties": False,
}
ANSWER = (
    '{"name":"Some long name, of a person","age":42,"tags":["cached words","those graphs"],'
    '"kind":"green","mail":"abc@def.com","share":-1.25}'
)
ANY_TEXT = r"(?s).*"


class Vocabulary:
    """A tokenizer of the size of Qwen2's: bytes, beginnings of words, and pairs of these."""

    def __init__(self) -> None:
        tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
        words: Counter[str] = Counter()
        library = Path(os.__file__).parent
        for path in (p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts):
            words.update(re.findall(r" ?[A-Za-z]+|[^\sA-Za-z\d]+|\s+", path.read_text("latin-1")))
        for word, _ in words.most_common():
            tokens |= dict.fromkeys(word[:length].encode() for length in range(2, len(word) + 1))
        known, rng = list(tokens), random.Random(0)
        while len(tokens) < VOCABULARY - len(CONTROL):
            tokens[rng.choice(known) + rng.choice(known)] = None
        self._tokens = list(tokens)[: VOCABULARY - len(CONTROL)]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self.size = VOCABULARY
        self.added = {name: len(self._tokens) + i for i, name in enumerate(CONTROL)}
        self.stop_ids = frozenset([self.added["<|endoftext|>"], self.added["<|im_end|>"]])

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id] if token_id < len(self._tokens) else b""

    def encode(self, text: str) -> list[int]:
        """Encode greedily, by the longest token from the left."""
        data, ids = text.encode(), []
        while data:
            length = next(n for n in range(min(24, len(data)), 0, -1) if data[:n] in self._ids)
            ids.append(self._ids[data[:length]])
            data = data[length:]
        return ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=models.SIZES, default="0.5b", help="default: 0.5b")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    tokenizer: Any = Vocabulary()
    started = time.perf_counter()
    vocabulary(tokenizer).result()
    figures = {"table of the vocabulary": [time.perf_counter() - started]}
    figures |= time_masks(tokenizer, 4 * args.repeats)
    figures |= time_steps(tokenizer, args.size, args.repeats)
    rows = [
        (name, len(s), *(f"{1e3 * value:.3f}" for value in (median(s), np.percentile(s, 99))))
        for name, s in figures.items()
    ]
    return table(["what", "times", "median, ms", "99th percentile, ms"], rows), figures


def time_masks(tokenizer: Any, repeats: int) -> dict[str, list[float]]:
    """Processor time in seconds, which does not depend on other load."""
    figures: dict[str, list[float]] = {"check of the schema": [], "first mask": [], "mask": []}
    figures |= {"mask and its lookup": []}
    for _ in range(repeats):
        find_problem.cache_clear()
        constraint = timed(figures["check of the schema"], lambda: constrained(schema=SCHEMA))
        matcher = Matcher(constraint, tokenizer)
        timed(figures["first mask"], lambda m=matcher: m._matcher.compute_bitmask())
        for token in tokenizer.encode(ANSWER):
            timed(figures["mask"], lambda m=matcher: m._matcher.compute_bitmask())
            timed(figures["mask and its lookup"], lambda m=matcher: mx.eval(m.mask()))
            matcher.advance(token)
    return figures


def timed(times: list[float], compute: Callable[[], Any]) -> Any:
    started = time.process_time()
    result = compute()
    times.append(time.process_time() - started)
    return result


def constrained(schema: Any = None, regex: str | None = None) -> Constraint:
    constraint = Constraint.of(schema, None, regex)
    assert constraint
    return constraint


class NoMatcher:
    """Allows every token, to time only the waiting for each token."""

    is_complete = False

    def mask(self) -> mx.array:
        return mx.array(0.0)

    def advance(self, token: int) -> None:
        pass


def time_steps(tokenizer: Any, size: str, repeats: int) -> dict[str, list[float]]:
    """Seconds per token with random weights; the variants take turns."""
    model = models.ours(size)
    model.set_dtype(default_dtype())
    mx.eval(model.parameters())
    ids = list(range(PROMPT))

    def decode(matcher: Any) -> Iterator[int]:
        cache = model.make_cache(PROMPT + TOKENS)
        if matcher is None:
            decoder = Decoder(model, cache, Sampler(Sampling(), VOCABULARY, ids), VOCABULARY)
        else:
            sampler = ConstrainedSampler(Sampling(), VOCABULARY, ids, matcher)
            decoder = ConstrainedDecoder(model, cache, sampler, VOCABULARY)
        return decoder.tokens(decoder.queue(mx.array([ids])), TOKENS)

    variants: dict[str, Callable[[], Any]] = {
        "token without constraint": lambda: None,
        "token, each waited for": NoMatcher,
        "token with regex " + ANY_TEXT: lambda: Matcher(constrained(regex=ANY_TEXT), tokenizer),
    }
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, matcher in variants.items():
            tokens = decode(matcher())
            next(tokens)
            started = time.perf_counter()
            count = sum(1 for _ in tokens)
            if turn:  # the first one warms up
                figures[name].append((time.perf_counter() - started) / max(1, count))
    return figures
