"""The command line: `python -m mlx_mobileclip COMMAND`, or `mlx-mobileclip COMMAND`.

The result goes to stdout, everything else to stderr.
"""

import argparse
import sys
from typing import Any

from . import __version__
from .cli import (
    check_command,
    classify_command,
    embed_command,
    evaluate_command,
    index_command,
    search_command,
)
from .cli.library_commands import LIBRARY_COMMANDS
from .terminal import CommandParser, open_standard_streams, run_command

COMMANDS: dict[str, Any] = {
    "classify": classify_command,
    "embed": embed_command,
    "evaluate": evaluate_command,
    "check": check_command,
    "index": index_command,
    "search": search_command,
    **LIBRARY_COMMANDS,
}


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of all commands."""
    parser = CommandParser(
        prog="python -m mlx_mobileclip",
        description="Classify and embed images and texts with Apple's MobileCLIP, natively in MLX.",
        epilog="The result goes to stdout, progress to stderr. "
        "Exit status: 0 done, 1 error or something skipped, 2 usage, 130 interrupted; of search "
        "0 found, 1 nothing found, 2 error.",
        examples=(
            *classify_command.EXAMPLES[:1],
            *embed_command.EXAMPLES[:1],
        ),
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP, examples=command.EXAMPLES)
        command.add_arguments(subparser)
        status, uses_mlx = getattr(command, "ERROR_STATUS", 1), getattr(command, "USES_MLX", True)
        subparser.set_defaults(run=command.run, error_status=status, uses_mlx=uses_mlx)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    open_standard_streams()
    args = build_parser().parse_args(argv)
    return run_command(
        lambda: args.run(args),
        debug=args.debug,
        error_status=args.error_status,
        limit_memory=args.uses_mlx,
    )


if __name__ == "__main__":
    sys.exit(main())
