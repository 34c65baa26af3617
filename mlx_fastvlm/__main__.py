"""The console script `mlx-fastvlm`, with a subcommand for each command of the package."""

import sys

from mlx_mobileclip import __version__
from mlx_mobileclip.terminal import CommandParser, open_standard_streams

from .check import command as check
from .cli import generate
from .server import command as server

COMMANDS = {
    "generate": (generate.main, "answer a question about images"),
    "check": (check.main, check.HELP),
    "server": (server.main, server.HELP),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return the exit status."""
    open_standard_streams()
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        run, _ = COMMANDS[argv[0]]
        return run(argv[1:], prog=f"mlx-fastvlm {argv[0]}")
    parser = CommandParser(
        prog="mlx-fastvlm",
        description="Apple's FastVLM, natively in MLX.",
        examples=(
            "mlx-fastvlm generate --model demo --image examples/scene.png",
            "mlx-fastvlm generate --help",
        ),
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, help_text) in COMMANDS.items():
        commands.add_parser(name, help=help_text)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        parser.error(f"give a command first, such as: mlx-fastvlm generate {argv[0]}")
    parser.parse_args(argv[:1])  # exits with help, version or a usage error
    return 2


if __name__ == "__main__":
    sys.exit(main())
