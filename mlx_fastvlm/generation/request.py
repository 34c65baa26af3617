"""The arguments of one answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..preprocess.messages import Message
from ..preprocess.processor import Images


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """The arguments of `stream_generate` for one answer, checked when it is prepared.

    Attributes:
        logprobs: If given, chunks of a batch have the log-probability of their token, and of this
            many most likely tokens, 0 to 20.
        kv_bits: Only for single answers; refused by a batch.
    """

    prompt: str | Sequence[Message]
    images: Images = None
    system: str | None = None
    resolution: int | None = None
    image_mode: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    schema: object = None
    choice: Iterable[str] | None = None
    regex: str | None = None
    kv_bits: int | None = None
    logprobs: int | None = None
