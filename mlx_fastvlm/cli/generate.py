"""The command `python -m mlx_fastvlm.generate`, or `mlx-fastvlm generate`.

stdout carries only the answer (or one JSON object); everything else goes to stderr.
"""

import argparse

from mlx_mobileclip.terminal import CommandParser, open_standard_streams, run_command

from ..defaults import DEFAULT_MAX_TOKENS, DEFAULT_PROMPT, PRESETS
from .options import add_model_arguments, add_output_arguments
from .ranks import report_lost_peers, run_rank


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser; `prog` is the name of the command in its usage message."""
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
    add_model_arguments(parser)
    parser.add_argument(
        "--image",
        action="extend",
        nargs="+",
        default=[],
        metavar="P",
        help="one or more image files, in order; - reads one from stdin",
    )
    question = parser.add_mutually_exclusive_group()
    question.add_argument(
        "--prompt",
        metavar="T",
        help="question, or - to read it from stdin; a pipe or file on stdin is also read if "
        f'--prompt is left out (default: "{DEFAULT_PROMPT}")',
    )
    question.add_argument("--preset", choices=sorted(PRESETS), help="question of Apple's demo app")
    parser.add_argument("--system", "--system-prompt", metavar="T", help="system prompt")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"maximum number of answer tokens (default: {DEFAULT_MAX_TOKENS}, or as many as "
        "fit the model)",
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
        help="quantise the KV cache to 8 or 4 bits, which is slower (default: floats)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="S",
        help="end the answer before this text; may be repeated",
    )
    constraint = parser.add_argument_group(
        "form of the answer",
        "needs the package llguidance: pip install 'mlx-fastvlm[schema]'",
    ).add_mutually_exclusive_group()
    constraint.add_argument(
        "--schema",
        metavar="X",
        help="the answer is compact JSON that meets this JSON schema, a file or the JSON itself",
    )
    constraint.add_argument(
        "--choice",
        type=lambda text: text.split(","),
        metavar="A,B,C",
        help="the answer is one of these texts, separated by commas",
    )
    constraint.add_argument(
        "--regex", metavar="R", help="the whole answer matches this regular expression"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="R",
        help="side in pixels, 128 to 1536 in steps of 64 (default: the checkpoint's, 1024)",
    )
    parser.add_argument(
        "--image-mode",
        choices=("pad", "crop"),
        help="pad to a square, or crop to it as Apple's model card does (default: the "
        "checkpoint's, pad)",
    )
    parser.add_argument(
        "--vision-from",
        metavar="P",
        help="checkpoint to take the image tower from, if M has none or only a Core ML package",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer further questions from stdin, one per line (end with Ctrl-D)",
    )
    parser.add_argument(
        "--image-cache",
        metavar="DIR",
        help="keep image embeddings in this directory, for later questions about the images",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_output_arguments(parser, "no progress and no statistics")
    return parser


def main(argv: list[str] | None = None, prog: str = "python -m mlx_fastvlm.generate") -> int:
    """Run the command and return the exit status."""
    open_standard_streams()
    return run_rank(lambda: _parse_and_run(argv, prog))


def _parse_and_run(argv: list[str] | None, prog: str) -> int:
    args = build_parser(prog).parse_args(argv)
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    # A slow import: --help and usage errors come before it, and Ctrl-C during it ends in one line.
    from .run_generate import run

    with report_lost_peers():
        run(args)
