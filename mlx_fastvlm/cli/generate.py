"""The command `python -m mlx_fastvlm.generate`, or `mlx-fastvlm generate`.

stdout carries the answer (or one JSON object) and nothing else; all the rest is on stderr.
"""

import argparse

from mlx_mobileclip import __version__
from mlx_mobileclip.terminal import CommandParser, open_standard_streams, run_command

from ..defaults import DEFAULT_MAX_TOKENS, DEFAULT_MODEL, DEFAULT_PROMPT, PRESETS


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The options; `prog` is what the usage message calls the command."""
    parser = CommandParser(
        prog=prog,
        examples=(
            f'{prog} --model demo --image examples/scene.png --prompt "How many shapes are there?"',
            f"{prog} --model demo --image examples/scene.png --chat",
        ),
        description="Answer a question about images with Apple's FastVLM, natively in MLX.",
        epilog="The answer goes to stdout, statistics and progress to stderr. "
        "Exit status: 0 done, 1 error, 2 usage, 130 interrupted.",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="repository on Hugging Face, checkpoint directory, or demo, the small model that "
        "comes with this package (default: %(default)s)",
    )
    parser.add_argument(
        "--image",
        action="extend",
        nargs="+",
        default=[],
        metavar="P",
        help="one or more image files, in order; - reads one from stdin",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt",
        metavar="T",
        help="question, or - for one from stdin, which is also read where a pipe or file is "
        f'connected to it and T is left out (default: "{DEFAULT_PROMPT}")',
    )
    what.add_argument("--preset", choices=sorted(PRESETS), help="question of Apple's demo app")
    parser.add_argument("--system", "--system-prompt", metavar="T", help="system prompt")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"most tokens of the answer (default: {DEFAULT_MAX_TOKENS}, or less if the model has "
        "no room for so many)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temp",
        "--temperature",
        type=float,
        default=0.0,
        metavar="F",
        help="temperature; 0 is greedy (default)",
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="F", help="1 is off (default)"
    )
    sampling.add_argument("--top-k", type=int, default=0, metavar="N", help="0 is off (default)")
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="F", help="0 is off (default)"
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="F", help="1 is off (default)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
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
        help="checkpoint to take the image tower from, if M has none, or instead of that in its "
        "Core ML package",
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


def main(argv: list[str] | None = None, prog: str = "python -m mlx_fastvlm.generate") -> int:
    """Run the command; returns the exit status."""
    open_standard_streams()
    args = build_parser(prog).parse_args(argv)
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    # Imported here, since it takes a while: --help and wrong options are answered at once, and an
    # interruption meanwhile ends in one line.
    from .run_generate import run

    run(args)
