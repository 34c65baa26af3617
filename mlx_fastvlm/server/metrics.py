"""Counters in Prometheus' text format.

Source: prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4.
"""

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

import mlx.core as mx

from ..generation.answer import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "mlx_fastvlm_"
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Metrics:
    """Counters of one server; used in the thread of its event loop."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._answers: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._first_token: list[int] = [0] * (len(BUCKETS) + 1)
        self._first_token_sum = 0.0
        self._embeddings: Counter[str] = Counter()

    def request(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests[path, status] += 1

    def first_token(self, seconds: float) -> None:
        """Record the time from a request to its first token."""
        self._first_token[bisect_left(BUCKETS, seconds)] += 1
        self._first_token_sum += seconds

    def answer(self, finish_reason: str, stats: Stats | None) -> None:
        """Count an answer that has ended; without statistics, it never began."""
        self._answers[finish_reason] += 1
        if stats is not None:
            self._tokens["prompt"] += stats.prompt_tokens
            self._tokens["cached"] += stats.cached_tokens
            self._tokens["image"] += stats.image_tokens
            self._tokens["generated"] += stats.generation_tokens

    def embedded(self, kind: str, count: int) -> None:
        """Count embeddings of a kind, "text" or "image"."""
        self._embeddings[kind] += count

    def text(self, running: int, waiting: int) -> str:
        """Format all metrics; `running` and `waiting` count answers in progress and queued."""
        lines = _counter(
            "requests_total",
            "Responses by path and status.",
            {f'path="{path}",status="{status}"': n for (path, status), n in self._requests.items()},
        )
        lines += _counter(
            "answers_total",
            "Answers that have ended, by reason; cancelled if the client went away.",
            {f'finish_reason="{reason}"': n for reason, n in self._answers.items()},
        )
        lines += _counter(
            "tokens_total",
            "Tokens of answers that have ended. Prompts include image and cached tokens.",
            {f'kind="{kind}"': n for kind, n in self._tokens.items()},
        )
        lines += _counter(
            "embeddings_total",
            "Embeddings by kind of input.",
            {f'kind="{kind}"': n for kind, n in self._embeddings.items()},
        )
        lines += self._histogram()
        lines += _gauge("answers_running", "Answers in progress.", running)
        lines += _gauge("answers_waiting", "Requests in the queue.", waiting)
        lines += _gauge("memory_bytes", "Memory in use by MLX.", mx.get_active_memory())
        lines += _gauge("memory_peak_bytes", "Peak memory in use by MLX.", mx.get_peak_memory())
        return "\n".join(lines) + "\n"

    def _histogram(self) -> list[str]:
        name = f"{PREFIX}time_to_first_token_seconds"
        bounds = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]
        counts = list(accumulate(self._first_token))
        return [
            f"# HELP {name} Time from the request to the first token.",
            f"# TYPE {name} histogram",
            *(f'{name}_bucket{{le="{b}"}} {n}' for b, n in zip(bounds, counts, strict=True)),
            f"{name}_sum {self._first_token_sum:.6f}",
            f"{name}_count {counts[-1]}",
        ]


def _counter(name: str, text: str, values: dict[str, int]) -> list[str]:
    return [
        f"# HELP {PREFIX}{name} {text}",
        f"# TYPE {PREFIX}{name} counter",
        *(f"{PREFIX}{name}{{{labels}}} {value}" for labels, value in sorted(values.items())),
    ]


def _gauge(name: str, text: str, value: int) -> list[str]:
    full = f"{PREFIX}{name}"
    return [f"# HELP {full} {text}", f"# TYPE {full} gauge", f"{full} {value}"]
