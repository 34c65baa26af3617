"""The command `python -m convert`, or `mlx-fastvlm-convert` once installed."""

import argparse
import sys
from typing import Any

from mlx_fastvlm.models.fastvlm import PARTS as FASTVLM_PARTS
from mlx_mobileclip import __version__
from mlx_mobileclip.cli.options import add_description_arguments
from mlx_mobileclip.device import DTYPES
from mlx_mobileclip.models.clip import PARTS as MOBILECLIP_PARTS
from mlx_mobileclip.paths import user_path
from mlx_mobileclip.quantization import MODES
from mlx_mobileclip.terminal import (
    CommandParser,
    hide_download_progress,
    open_standard_streams,
    run_command,
)

from .export.runtimes import TARGETS
from .options import ConvertOptions
from .pipeline import run


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m convert`, with mlx-lm's option names."""
    prog = f"python -m {__package__}"  # mlx_fastvlm.convert once installed
    parser = CommandParser(
        prog=prog,
        examples=(
            f"{prog} --model demo --mlx-path demo-4bit -q --verify",
            f"{prog} --model demo --mlx-path demo-transformers --layout transformers",
        ),
        description="Convert a FastVLM or MobileCLIP checkpoint of any known layout to the form "
        "that loads fastest: re-parameterised, folded, NHWC.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="SRC",
        help="repository or directory to convert, or demo, the FastVLM that comes with this "
        "package; for MobileCLIP also a .pt, .bin or .safetensors file",
    )
    parser.add_argument(
        "--mlx-path", required=True, type=user_path, metavar="DST", help="directory to create"
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="float16",
        help="dtype of the written weights (default: %(default)s)",
    )
    parser.add_argument(
        "--variant",
        metavar="V",
        help="MobileCLIP: published model with the architecture of SRC, such as MobileCLIP2-S0, if "
        "its name does not state it",
    )
    add_description_arguments(parser)
    parser.add_argument(
        "--vision-from",
        metavar="P",
        help="FastVLM: checkpoint to take the image tower from, if SRC has none or only a Core ML "
        "package",
    )
    parser.add_argument(
        "--layout",
        choices=sorted(TARGETS),
        help="FastVLM: write the layout of this runtime, instead of the one that is fastest here",
    )
    parser.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="quantise FastVLM's decoder with its embedding, or both of MobileCLIP's towers",
    )
    parser.add_argument(
        "--q-bits", type=int, metavar="B", help="bits per weight, 2 to 8 (default: the mode's, 4)"
    )
    parser.add_argument(
        "--q-group-size",
        type=int,
        metavar="G",
        help="weights that share a scale: 32, 64 or 128 (default: the mode's, 64)",
    )
    parser.add_argument("--q-mode", choices=sorted(MODES), help="default: affine")
    parser.add_argument(
        "--q-parts",
        nargs="+",
        choices=sorted({*FASTVLM_PARTS, *MOBILECLIP_PARTS}),
        metavar="P",
        help="parts to quantise: for FastVLM any of "
        f"{', '.join(FASTVLM_PARTS)}; for MobileCLIP any of {', '.join(MOBILECLIP_PARTS)}",
    )
    parser.add_argument(
        "--q-mixed",
        action="store_true",
        help="use more than --q-bits for the layers that need it most, as measured on the "
        "calibration images: half a bit per weight on average, or up to --max-size",
    )
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        help="size limit of the weights, such as 400MB, for mixed bits; from 2 bits up and for all "
        "parts, unless --q-bits or --q-parts are given",
    )
    parser.add_argument(
        "--calibration",
        type=user_path,
        metavar="DIR",
        help="images to measure the quantised model on (default: generated drawings)",
    )
    parser.add_argument(
        "-d",
        "--dequantize",
        action="store_true",
        help="write a quantised checkpoint as floats",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the written tensors back, bit by bit, and compare each stage's output on a "
        "test image with the source's; a mismatch fails the conversion",
    )
    parser.add_argument(
        "--upload-repo",
        metavar="NAME",
        help="push the directory to this repository on Hugging Face, such as you/model",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status."""
    open_standard_streams()
    arguments = sys.argv[1:] if argv is None else argv
    values = vars(build_parser().parse_args(arguments))
    debug = values.pop("debug")
    return run_command(lambda: _run(values, arguments), debug=debug)


def _run(values: dict[str, Any], arguments: list[str]) -> None:
    options = ConvertOptions(**values)
    if options.quiet:
        hide_download_progress()
    run(options, arguments)


if __name__ == "__main__":
    sys.exit(main())
