"""Answer a prompt about images: prefill in one pass, then one token at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlx_mobileclip.errors import ModelError
from mlx_mobileclip.gpu.memory import wired_weights

from ..models.fastvlm import FastVLM
from ..preprocess.messages import Message
from ..preprocess.processor import Images, Processor
from .answer import Chunk, Result, join_chunks
from .image_cache import ImageCache
from .prefill import PreparedRequest
from .prompt_cache import PromptCache
from .request import Request

RESERVED_TOKENS = 1024  # of the answer, allocated in advance in the KV cache


def generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    images: Images = None,
    **options: Any,
) -> Result:
    """Answer a prompt and return when the answer is complete.

    Args:
        model: From `load`.
        processor: From `load`.
        prompt: A question, or a list of messages.
        images: One image or several, in the order of their places in the prompt.
        **options: Keyword arguments of `stream_generate`.

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used.
    """
    chunks = list(stream_generate(model, processor, prompt, images, **options))
    return join_chunks(chunks, processor)


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    images: Images = None,
    *,
    system: str | None = None,
    resolution: int | None = None,
    image_mode: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    schema: object = None,
    choice: Iterable[str] | None = None,
    regex: str | None = None,
    kv_bits: int | None = None,
    prompt_cache: PromptCache | None = None,
    image_cache: ImageCache | None = None,
) -> Iterator[Chunk]:
    """Answer a prompt as a stream of chunks, one for each token.

    Args:
        model: From `load`.
        processor: From `load`.
        prompt: A question, or a list of messages (see `messages.read_messages`).
        images: One image or several, in the order of their places in the prompt.
        system: System prompt instead of the default.
        resolution: Side in pixels that images are resized to.
        image_mode: "pad" or "crop".
        max_tokens: Maximum number of tokens; prompt and answer together must fit the model. By
            default 256, or as many as fit.
        temperature: 0 for greedy; see `Sampling` for this and the next five.
        top_p: Nucleus probability.
        top_k: Number of tokens to sample from.
        min_p: Least probability, relative to the most likely token's.
        repetition_penalty: Above 1 discourages tokens already seen.
        seed: Makes sampling repeatable.
        stop: Text or texts that end the answer; they are not part of it.
        schema: The answer is JSON of this schema: a dictionary, a pydantic model or a dataclass.
        choice: The answer is one of these texts.
        regex: The whole answer matches this regular expression. Of these three only one can be
            given, and no stop text with it. If the answer ends with "stop", it meets it.
        kv_bits: 8 or 4 to quantise the KV cache; off by default, since it is slower and at the
            length of a FastVLM prompt saves little.
        prompt_cache: Keys and values of earlier prompts, to reuse a common prefix; this prompt and
            its answer are added. By default the whole prompt is computed.
        image_cache: Embeddings of images seen before; those of new images are added. By default
            one that lives as long as the model.

    Yields:
        Chunks; the last one has a finish_reason: "stop" at an end token, at a stop text or where
        a constraint leaves nothing to add, else "length".

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used; also when the model's
            arithmetic overflows.
    """
    request = Request(
        prompt,
        images,
        system=system,
        resolution=resolution,
        image_mode=image_mode,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        schema=schema,
        choice=choice,
        regex=regex,
        kv_bits=kv_bits,
    )
    prepared = PreparedRequest(model, processor, request, prompt_cache, image_cache)
    max_tokens, answer = prepared.max_tokens, prepared.answer
    decoder, first = prepared.prefill(min(max_tokens, RESERVED_TOKENS))
    try:
        with wired_weights():
            for token in decoder.tokens(first, max_tokens):
                chunk = answer.add(token, is_complete=decoder.is_complete)
                yield chunk
                if chunk.finish_reason:
                    return
                prepared.sequence.append(token)
    except ModelError:
        prepared.sequence.pop()  # its keys and values may not be finite
        raise
    finally:  # also if the caller stops early
        if answer.count:
            prepared.keep(decoder.cache)
