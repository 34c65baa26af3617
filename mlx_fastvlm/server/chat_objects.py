"""Convert chunks of an answer to OpenAI's chat completion objects."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..generation.answer import Chunk, Stats
from ..preprocess.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # OpenAI's value for an impossible token; JSON has no infinity


class ChatObjects:
    """Builds the objects of one answer, which share an id and a creation time."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, with_logprobs: bool):
        """Begin an answer of the named model."""
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._tokenizer, self._with_logprobs = tokenizer, with_logprobs

    def completion(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """Return a complete `chat.completion`."""
        last = chunks[-1]
        text = "".join(chunk.text for chunk in chunks)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(chunks),
            "finish_reason": last.finish_reason,
        }
        return {
            "object": "chat.completion",
            **self._head,
            "choices": [choice],
            "usage": usage(last.stats),
        }

    def first_delta(self) -> dict[str, Any]:
        """Return the first chunk of a stream."""
        return self._delta({"role": "assistant", "content": "", "refusal": None}, None, None)

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """Return the chunk of a stream for new text."""
        return self._delta({"content": chunk.text}, self._logprobs([chunk]), None)

    def last_delta(self, finish_reason: str) -> dict[str, Any]:
        """Return the chunk that ends the text of a stream."""
        return self._delta({}, None, finish_reason)

    def usage_chunk(self, stats: Stats) -> dict[str, Any]:
        """Return the token counts that end a stream."""
        return {
            "object": "chat.completion.chunk",
            **self._head,
            "choices": [],
            "usage": usage(stats),
        }

    def is_worth_sending(self, chunk: Chunk) -> bool:
        """Whether a chunk has text or log-probabilities."""
        return bool(chunk.text) or (self._with_logprobs and not self._is_end(chunk))

    def _delta(self, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {"object": "chat.completion.chunk", **self._head, "choices": [choice]}

    def _logprobs(self, chunks: Sequence[Chunk]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._token(chunk.token, chunk.logprob),
                "top_logprobs": [self._token(token, p) for token, p in chunk.top_logprobs],
            }
            for chunk in chunks
            if not self._is_end(chunk)
        ]
        return {"content": content, "refusal": None}

    def _is_end(self, chunk: Chunk) -> bool:
        return chunk.token < 0 or chunk.token in self._tokenizer.stop_ids

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        if data:
            text = data.decode("utf-8", "replace")
        else:
            text = next((name for name, i in self._tokenizer.added.items() if i == token), "")
        if logprob is not None:
            logprob = max(logprob, LEAST_LOGPROB)
        return {"token": text, "logprob": logprob, "bytes": list(data) or None}


def usage(stats: Stats) -> dict[str, Any]:
    """Return token counts; image tokens are part of the prompt."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generation_tokens,
        "total_tokens": stats.prompt_tokens + stats.generation_tokens,
        "prompt_tokens_details": {
            "cached_tokens": stats.cached_tokens,
            "image_tokens": stats.image_tokens,
        },
    }
