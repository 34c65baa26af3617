"""The command `python -m mlx_fastvlm.check`, or `mlx-fastvlm check`."""

import argparse
import os

from mlx_mobileclip import __version__
from mlx_mobileclip.cli.check_command import HELP as HELP
from mlx_mobileclip.cli.check_command import add_json_argument, print_report
from mlx_mobileclip.terminal import CommandParser, open_standard_streams, run_command

from ..defaults import DEFAULT_MODEL


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser; `prog` is the name of the command in its usage message."""
    parser = CommandParser(
        prog=prog,
        examples=(f"{prog} --model demo", f"{prog} --model demo --dtype float16 --json"),
        description=f"{HELP[0].upper()}{HELP[1:]}: each part on the default device against "
        "float32 on the CPU.",
        epilog="The result goes to stdout, progress to stderr. "
        "Exit status: 0 all right, 1 something is wrong, 2 usage, 130 interrupted.",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="repository on Hugging Face, checkpoint directory, or demo, the small model that "
        "comes with this package (default: %(default)s)",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="default: float16 on a GPU, float32 on a CPU",
    )
    add_json_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(argv: list[str] | None = None, prog: str = "python -m mlx_fastvlm.check") -> int:
    """Run the command and return the exit status."""
    open_standard_streams()
    args = build_parser(prog).parse_args(argv)
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from .fastvlm import check_fastvlm  # imports MLX, which --help does not need

    options = {name: getattr(args, name) for name in ("revision", "dtype", "quiet")}
    print_report(check_fastvlm(args.model, **options), args.json)
