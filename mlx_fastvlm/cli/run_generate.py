"""Run `mlx-fastvlm generate` with parsed options.

stdout carries only the answer (or one JSON object); everything else goes to stderr.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from mlx_mobileclip.checkpoints.hub import is_repository
from mlx_mobileclip.cpu.process import slow_blas_remedy
from mlx_mobileclip.errors import PromptError
from mlx_mobileclip.preprocess.image import find_image, is_data_uri
from mlx_mobileclip.terminal import hide_download_progress, printable, progress, say

from ..defaults import DEFAULT_PROMPT
from ..generation.answer import Result, Stats, join_chunks
from ..generation.constraints import Constraint
from ..generation.image_cache import ImageCache
from ..generation.prompt_cache import PromptCache
from ..generation.sampling import Sampling
from ..generation.stream import stream_generate
from ..loader import find_checkpoint, load_checkpoint
from ..models.sharding import check_same_model, finish, join
from ..preprocess.processor import check_resolution
from .schema_option import read_schema
from .shared_input import share_inputs, share_lines
from .stdin import chat, read_inputs, read_lines


def run(args: argparse.Namespace) -> None:
    """Load the model and answer; `args` are those of `generate.build_parser`."""
    if args.schema is not None:
        args.schema = read_schema(args.schema)
    constraint = Constraint.of(args.schema, args.choice, args.regex, args.stop)
    if args.quiet:
        hide_download_progress()
    group = join()
    prompt, images = read_inputs(args) if group is None else share_inputs(args, group)
    if is_repository(args.model):
        _check_options(args, prompt, images)  # before anything is downloaded
    checkpoint = find_checkpoint(args.model, args.revision)
    _check_options(args, prompt, images)
    started = time.perf_counter()
    with progress(f"loading {args.model}", quiet=args.quiet) as set_status:
        model, processor = load_checkpoint(
            checkpoint, args.dtype, args.vision_from, group, constrained=constraint is not None
        )
        if group is not None:
            check_same_model(model, group, args.model)
        commit = f" at {checkpoint.revision[:12]}" if checkpoint.revision else ""
        set_status(f"loaded {args.model}{commit}")
    load_s = time.perf_counter() - started
    if not args.quiet and (remedy := slow_blas_remedy()):
        say(f"note: {remedy}")
    options = _options(args)
    messages: list[dict[str, str]] = []

    def answer(question: str) -> None:
        conversation = [*messages, {"role": "user", "content": question}]
        chunks = []
        for chunk in stream_generate(model, processor, conversation, images, **options):
            chunks.append(chunk)
            if not args.json:
                print(_for_stdout(chunk.text), end="", flush=True)
        result = join_chunks(chunks, processor)
        messages[:] = [*conversation, {"role": "assistant", "content": result.text}]
        if args.json:
            print(json.dumps(_report(args.model, result, load_s)), flush=True)
        else:
            print(flush=True)
            if not args.quiet:
                say(_summary(result.stats))
        if constraint is not None and result.finish_reason == "length":
            raise PromptError(
                f"the answer was cut off after {result.stats.generation_tokens} tokens, so it may "
                f"not meet --{constraint.name}; raise --max-tokens"
            )

    if args.chat:
        chat(read_lines(prompt) if group is None else share_lines(prompt, group), answer)
    else:
        answer(DEFAULT_PROMPT if prompt is None else prompt)
    if group is not None:
        finish(group)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `stream_generate`; all questions of a chat share its caches."""
    names = (
        *("system", "resolution", "image_mode", "max_tokens", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "seed", "stop", "schema", "choice", "regex", "kv_bits"),
    )
    return {
        **{name: getattr(args, name) for name in names},
        "temperature": args.temp,
        "prompt_cache": PromptCache(),
        "image_cache": ImageCache(directory=args.image_cache),
    }


def _check_options(args: argparse.Namespace, prompt: str | None, images: list[Any]) -> None:
    """Report invalid options before the model is loaded."""
    if args.resolution is not None:
        check_resolution(args.resolution)
    if not args.image and prompt is None and not args.chat:
        raise PromptError("there is nothing to answer; give --image, --prompt or both")
    for image in images:
        if isinstance(image, str) and not is_data_uri(image):
            find_image(image)
    Sampling(args.repetition_penalty, args.temp, args.top_k, args.top_p, args.min_p, args.seed)


def _summary(stats: Stats) -> str:
    return (
        f"prompt {stats.prompt_tokens} tokens ({stats.image_tokens} image), first token after "
        f"{stats.ttft_s:.2f} s (preprocess {stats.preprocess_s:.2f}, vision {stats.vision_s:.2f}, "
        f"prefill {stats.prefill_s:.2f}); {stats.generation_tokens} tokens at "
        f"{stats.decode_tokens_per_s:.1f} tokens/s; "
        f"peak memory {stats.peak_memory_bytes / 1e9:.2f} GB"
    )


def _report(model: str, result: Result, load_s: float) -> dict[str, Any]:
    """The object that --json prints."""
    stats = asdict(result.stats)
    counts = ("image_tokens", "prompt_tokens", "generation_tokens")
    times = ("preprocess_s", "vision_s", "prefill_s", "ttft_s", "decode_tokens_per_s")
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "model": model,
        **{name: stats[name] for name in counts},
        "timings": {"load_s": load_s, **{name: stats[name] for name in times}},
        "peak_memory_bytes": stats["peak_memory_bytes"],
    }


def _for_stdout(text: str) -> str:
    """Remove control characters if stdout is a terminal."""
    return printable(text, keep="\n\t") if sys.stdout.isatty() else text
