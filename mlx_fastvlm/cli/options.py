"""Options that the commands of FastVLM share."""

import argparse

from mlx_mobileclip import __version__
from mlx_mobileclip.cli.options import add_loading_arguments

from ..defaults import DEFAULT_MODEL


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --revision and --dtype."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="repository on Hugging Face, checkpoint directory, or demo, the small model that "
        "comes with this package (default: %(default)s)",
    )
    add_loading_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser, quiet_help: str) -> None:
    """Add --quiet, --debug and --version."""
    parser.add_argument("--quiet", action="store_true", help=quiet_help)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=__version__)
