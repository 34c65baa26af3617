"""The command line: `python -m mlx_fastvlm.generate`, `mlx-fastvlm`.

stdout carries the answer (or one JSON object) and nothing else; all the rest is on stderr.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_mobileclip import __version__
from mlx_mobileclip.command import progress, run_command
from mlx_mobileclip.errors import PromptError

if TYPE_CHECKING:
    from .generate import Result, Stats

DEFAULT_PROMPT = "Describe the image."
# MLX keeps freed memory for reuse, by default all that it ever had: much for a Mac of 8 GB, after
# an image of 1024 px. What is wired down is left at MLX's default.
FREED_BYTES = 1 << 30
PRESETS = {  # the questions of Apple's demo app
    "describe": ("Describe the image in English. Output should be brief, about 15 words or less."),
    "expression": ("What is this person's facial expression? Output only one or two words."),
    "read": "What is written in this image? Output only the text in the image.",
}


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m mlx_fastvlm.generate`."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_fastvlm.generate",
        description="Answer a question about images with Apple's FastVLM, natively in MLX.",
        epilog="The answer goes to stdout, statistics and progress to stderr. "
        "Exit status: 0 done, 1 error, 2 usage, 130 interrupted.",
    )
    parser.add_argument(
        "--model",
        default="apple/FastVLM-0.5B",
        metavar="M",
        help="repository on Hugging Face, checkpoint directory, or demo, the small model that "
        "comes with this package (default: %(default)s)",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="P",
        help="image file; give it again for further images, in order",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="T", help=f'question (default: "{DEFAULT_PROMPT}")')
    what.add_argument("--preset", choices=sorted(PRESETS), help="question of Apple's demo app")
    parser.add_argument("--system", metavar="T", help="system prompt")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="most tokens of the answer (default: %(default)s)",
    )
    drawing = parser.add_argument_group("drawing of tokens")
    drawing.add_argument(
        "--temp", type=float, default=0.0, metavar="F", help="temperature; 0 is greedy (default)"
    )
    drawing.add_argument("--top-p", type=float, default=1.0, metavar="F", help="1 is off (default)")
    drawing.add_argument("--top-k", type=int, default=0, metavar="N", help="0 is off (default)")
    drawing.add_argument("--min-p", type=float, default=0.0, metavar="F", help="0 is off (default)")
    drawing.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="F", help="1 is off (default)"
    )
    drawing.add_argument("--seed", type=int, metavar="N", help="for a repeatable draw")
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 4),
        help="keep the KV cache in so many bits (default: in floats)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="S",
        help="end the answer before this text; may be given again",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="R",
        help="side in px, 128 to 1536 in steps of 64 (default: the checkpoint's, 1024)",
    )
    parser.add_argument(
        "--image-mode",
        choices=("pad", "crop"),
        help="pad to a square, or crop to it as Apple's model card does (default: the "
        "checkpoint's, pad)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="default: float16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--vision-from",
        metavar="P",
        help="checkpoint to take the image tower from, for app exports, which have none",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="go on with a question a line from stdin, each answered at once (end: Ctrl-D)",
    )
    parser.add_argument(
        "--image-cache",
        metavar="DIR",
        help="keep what the model saw in the images there, for further questions about them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress and no statistics")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    prompt = PRESETS[args.preset] if args.preset else args.prompt
    from mlx_mobileclip.hub import is_repository

    from .loader import find_checkpoint, load_checkpoint

    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if is_repository(args.model):
        _check(args, prompt)  # before anything is downloaded
    checkpoint = find_checkpoint(args.model, args.revision)
    _check(args, prompt)
    import mlx.core as mx

    mx.set_cache_limit(FREED_BYTES)
    started = time.perf_counter()
    with progress(f"loading {args.model}", quiet=args.quiet) as tell:
        from .generate import join, stream_generate
        from .image_cache import ImageCache
        from .prompt_cache import PromptCache

        model, processor = load_checkpoint(checkpoint, args.dtype, args.vision_from)
        model.image_cache = ImageCache(directory=args.image_cache)
        if checkpoint.revision:
            tell(f"loaded {args.model} at {checkpoint.revision[:12]}")
        else:
            tell(f"loaded {args.model}")
    load_s = time.perf_counter() - started
    prompt_cache = PromptCache()
    messages: list[dict[str, str]] = []
    for question in _questions(prompt, chat=args.chat):
        messages.append({"role": "user", "content": question})
        chunks = []
        for chunk in stream_generate(
            model,
            processor,
            messages,
            args.image,
            system=args.system,
            resolution=args.resolution,
            image_mode=args.image_mode,
            max_tokens=args.max_tokens,
            temperature=args.temp,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
            stop=args.stop,
            kv_bits=args.kv_bits,
            prompt_cache=prompt_cache,
        ):
            chunks.append(chunk)
            if not args.json:
                print(_printable(chunk.text), end="", flush=True)
        result = join(chunks, processor)
        messages.append({"role": "assistant", "content": result.text})
        if args.json:
            print(json.dumps(_report(args.model, result, load_s)), flush=True)
            continue
        print(flush=True)
        if not args.quiet:
            print(_summary(result.stats), file=sys.stderr)


def _questions(prompt: str | None, *, chat: bool) -> Iterator[str]:
    """The question given; in a chat then one a line from stdin, up to its end."""
    if not chat:
        yield DEFAULT_PROMPT if prompt is None else prompt
        return
    if prompt is not None:
        yield prompt
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _check(args: argparse.Namespace, prompt: str | None) -> None:
    """Find what is wrong with the options before the model is loaded."""
    from mlx_mobileclip.image import find_image

    from .processor import check_resolution
    from .sampling import Sampling

    if args.resolution is not None:
        check_resolution(args.resolution)
    if not args.image and prompt is None and not args.chat:
        raise PromptError("there is nothing to answer; give --image, --prompt or both")
    for path in args.image:
        find_image(path)
    Sampling(args.repetition_penalty, args.temp, args.top_k, args.top_p, args.min_p, args.seed)


def _summary(stats: "Stats") -> str:
    return (
        f"prompt {stats.prompt_tokens} tokens ({stats.image_tokens} image), first token after "
        f"{stats.ttft_s:.2f} s (preprocess {stats.preprocess_s:.2f}, vision {stats.vision_s:.2f}, "
        f"prefill {stats.prefill_s:.2f}); {stats.generated_tokens} tokens at "
        f"{stats.decode_tokens_per_s:.1f} tokens/s; "
        f"peak memory {stats.peak_memory_bytes / 1e9:.2f} GB"
    )


def _report(model: str, result: "Result", load_s: float) -> dict[str, Any]:
    """The object that --json prints."""
    stats = asdict(result.stats)
    counts = ("image_tokens", "prompt_tokens", "generated_tokens")
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


def _printable(text: str) -> str:
    """On a terminal, drop the control characters that could move its cursor or worse."""
    if not sys.stdout.isatty():
        return text
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
