"""The command `python -m mlx_fastvlm.server`, or `mlx-fastvlm server`."""

import argparse
from collections.abc import Callable

from mlx_mobileclip.errors import ModelError
from mlx_mobileclip.terminal import CommandParser, open_standard_streams, run_command

from ..cli.options import add_model_arguments, add_output_arguments
from .settings import DEFAULT_HOST, DEFAULT_PORT, KEY_VARIABLE, Settings

HELP = "serve an OpenAI-compatible HTTP API"


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser; `prog` is the name of the command in its usage message."""
    parser = CommandParser(
        prog=prog,
        examples=(f"{prog} --model demo", f"{prog} --clip-model apple/MobileCLIP2-S0 --ui"),
        description=f"{HELP[0].upper()}{HELP[1:]}: chat with images, embeddings, classification.",
        epilog="Everything is printed to stderr. Exit status: 0 ended by SIGTERM, 1 error, "
        "2 usage, 130 interrupted.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--clip-model",
        metavar="M",
        help="MobileCLIP for embeddings and labels: repository, directory, file or demo "
        "(default: demo if the model is demo, else none)",
    )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--host", default=DEFAULT_HOST, metavar="A", help="address (default: %(default)s)"
    )
    access.add_argument(
        "--port",
        type=_within(0, 65535),
        default=DEFAULT_PORT,
        metavar="N",
        help="port, or 0 for a free one (default: %(default)s)",
    )
    access.add_argument(
        "--api-key",
        metavar="K",
        help=f"key that clients must send, also read from {KEY_VARIABLE}; required unless the "
        "address is a loopback address",
    )
    access.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that clients may use for this server; may be repeated",
    )
    access.add_argument("--ui", action="store_true", help="serve a web page to chat with the model")
    _add_limits(parser)
    add_output_arguments(parser, "no progress")
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    for option, low, high, default, text in (
        ("--max-batch", 1, 256, Settings.max_batch, "answers generated in one batch"),
        ("--max-queue", 0, 10_000, Settings.max_queue, "requests that may wait; others get 429"),
        ("--max-tokens", 1, 1 << 20, Settings.max_tokens, "maximum tokens of an answer"),
        ("--max-images", 1, 1000, Settings.max_images, "maximum images in a request"),
        ("--max-body", 1, 1024, Settings.max_body_bytes >> 20, "maximum size of a request in MB"),
        ("--drain", 0, 86_400, int(Settings.drain_s), "seconds for running answers at shutdown"),
    ):
        limits.add_argument(
            option,
            type=_within(low, high),
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )


def _within(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {low} to {high}")
        return value

    parse.__name__ = "integer"
    return parse


def main(argv: list[str] | None = None, prog: str = "python -m mlx_fastvlm.server") -> int:
    """Run the command and return the exit status."""
    open_standard_streams()
    args = build_parser(prog).parse_args(argv)
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "the server needs starlette and uvicorn; install them with "
            "pip install 'mlx-fastvlm[serve]'"
        ) from error
    from .serve import run  # imports MLX, which --help does not need

    run(args)
