"""The command `python -m mlx_fastvlm.check`, or `mlx-fastvlm check`."""

import argparse

from mlx_mobileclip.cli.check_command import HELP as HELP
from mlx_mobileclip.cli.check_command import add_json_argument, print_report
from mlx_mobileclip.terminal import (
    CommandParser,
    hide_download_progress,
    open_standard_streams,
    run_command,
)

from ..cli.options import add_model_arguments, add_output_arguments


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser; `prog` is the name of the command in its usage message."""
    parser = CommandParser(
        prog=prog,
        examples=(f"{prog} --model demo", f"{prog} --model demo --dtype float16 --json"),
        description=f"{HELP[0].upper()}{HELP[1:]}: compare each layer on the default device with "
        "float32 on the CPU.",
        epilog="The result goes to stdout, progress to stderr. "
        "Exit status: 0 all right, 1 something is wrong, 2 usage, 130 interrupted.",
    )
    add_model_arguments(parser)
    add_json_argument(parser)
    add_output_arguments(parser, "no progress")
    return parser


def main(argv: list[str] | None = None, prog: str = "python -m mlx_fastvlm.check") -> int:
    """Run the command and return the exit status."""
    open_standard_streams()
    args = build_parser(prog).parse_args(argv)
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.quiet:
        hide_download_progress()
    from .fastvlm import check_fastvlm  # imports MLX, which --help does not need

    options = {name: getattr(args, name) for name in ("revision", "dtype", "quiet")}
    print_report(check_fastvlm(args.model, **options), args.json)
