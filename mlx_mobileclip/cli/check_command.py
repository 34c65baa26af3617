"""`check`: compare what this machine computes with float32 on the CPU."""

import argparse
import json
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..terminal import hide_download_progress, printable
from .options import add_model_arguments, model_options

if TYPE_CHECKING:
    from ..check.report import Report

HELP = "check that this machine computes correct values"
EXAMPLES = (
    "mlx-mobileclip check --model demo",
    "mlx-mobileclip check --model demo --dtype float16 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    add_json_argument(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, to send back")


def run(args: argparse.Namespace) -> None:
    """Check MobileCLIP and print the report.

    Raises:
        ModelError: something is wrong, or the model cannot be used.
    """
    if args.quiet:
        hide_download_progress()
    from ..check.mobileclip import check_mobileclip

    report = check_mobileclip(args.model, **model_options(args), quiet=args.quiet)
    print_report(report, args.json)


def print_report(report: "Report", as_json: bool) -> None:
    """Print a report as a table or as JSON.

    Raises:
        ModelError: something is wrong.
    """
    if as_json:
        print(json.dumps(report.to_json(), allow_nan=False))
    else:
        for line in report.lines():
            print(printable(line))
    if report.wrong:
        raise ModelError("this machine computes wrong values; report what --json prints")
