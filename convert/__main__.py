"""Convert a checkpoint of any known layout: `python -m convert --model SRC --mlx-path DST`."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.loader import find_checkpoint, read_canonical, read_tokenizer
from mlx_fastvlm.model import PARTS as FASTVLM_PARTS
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_mobileclip.checkpoint import check_fit, read_json
from mlx_mobileclip.clip import MODEL_TYPE as MOBILECLIP_TYPE
from mlx_mobileclip.clip import PARTS as MOBILECLIP_PARTS
from mlx_mobileclip.clip import MobileCLIP, MobileCLIPConfig
from mlx_mobileclip.command import progress, run_command
from mlx_mobileclip.device import DTYPES
from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.hub import (
    DEMO,
    WEIGHT_SUFFIXES,
    Checkpoint,
    look,
    resolve_file,
)
from mlx_mobileclip.loader import read_canonical as read_mobileclip
from mlx_mobileclip.loader import read_tokenizer as read_clip_tokenizer
from mlx_mobileclip.processor import Processor as ClipProcessor
from mlx_mobileclip.quantization import MODES
from mlx_mobileclip.tokenizer import read_merges, write_merges
from mlx_mobileclip.variants import published_variant

from . import interchange
from .calibration import Sample, samples
from .conversion import Conversion, convert
from .quantize import Tensors
from .recipe import parse_size
from .retrace import Account, retrace_fastvlm, retrace_mobileclip
from .upload import check_repository, upload
from .walk import Read, Seen, Units, walk_fastvlm, walk_mobileclip
from .write import check_target, file_states


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m convert`; names follow mlx-lm's."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",  # mlx_fastvlm.convert once installed
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
        "--mlx-path", required=True, type=Path, metavar="DST", help="directory to create"
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="float16",
        help="of the weights written (default: %(default)s)",
    )
    parser.add_argument(
        "--variant",
        metavar="V",
        help="MobileCLIP: the published model it is built like, such as MobileCLIP2-S0, where "
        "its name does not tell",
    )
    parser.add_argument(
        "--vision-from",
        metavar="P",
        help="checkpoint to take the image tower from, for app exports, which have none",
    )
    parser.add_argument(
        "--layout",
        choices=sorted(interchange.TARGETS),
        help="FastVLM: write what this runtime loads, instead of the form that is fastest here",
    )
    parser.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="quantise: of FastVLM the decoder and its embedding, of MobileCLIP both towers",
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
        help="what to quantise: of FastVLM any of "
        f"{', '.join(FASTVLM_PARTS)}; of MobileCLIP any of {', '.join(MOBILECLIP_PARTS)}",
    )
    parser.add_argument(
        "--q-mixed",
        action="store_true",
        help="more than --q-bits for the layers that need them most, as measured on the "
        "calibration pictures: half a bit per weight in all, or what --max-size leaves room for",
    )
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        help="of the weights, such as 400MB: the mixture that fits; from 2 bits up and of all "
        "parts, unless --q-bits or --q-parts tell otherwise",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="pictures to measure the quantised model on (default: some that are drawn for it)",
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="write a quantised checkpoint as floats again"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read back what was written, find every tensor of the source in it, and compare every "
        "stage of a pass on a test image; a mismatch fails the conversion",
    )
    parser.add_argument(
        "--upload-repo",
        metavar="NAME",
        help="then push the directory to this repository on Hugging Face, such as you/model",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    args.arguments = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    needing = (
        *(args.q_bits, args.q_group_size, args.q_mode, args.q_parts, args.calibration),
        *(args.q_mixed or None, args.max_size),
    )
    if not args.quantize and any(value is not None for value in needing):
        raise ConfigError("--calibration, --max-size and every --q-... option need -q; add it")
    args.q_mixed = args.q_mixed or args.max_size is not None
    if args.q_mixed and args.q_mode not in (None, "affine"):
        raise ConfigError(f"{args.q_mode} has one number of bits; leave out --q-mixed or --q-mode")
    args.max_bytes = None if args.max_size is None else parse_size(args.max_size)
    if args.quantize and args.dequantize:
        raise ConfigError("-q and --dequantize are opposites; convert twice to quantise anew")
    args.samples = samples(args.calibration) if args.quantize or args.verify else []
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if args.upload_repo:
        check_repository(args.upload_repo)
    check_target(args.mlx_path)
    if _is_mobileclip(args.model, args.variant):
        _run_mobileclip(args)
    else:
        _run_fastvlm(args)
    if args.upload_repo:
        with progress(f"uploading to {args.upload_repo}", quiet=args.quiet) as tell:
            tell(f"uploaded: {upload(args.mlx_path, args.upload_repo)}")


def _is_mobileclip(model: str, variant: str | None) -> bool:
    """MobileCLIP by its name, as a single file, or by a config that names no other model."""
    if variant is not None or published_variant(model) is not None:
        return True
    if model == DEMO:
        return False
    path, is_directory, is_file = look(model)
    if is_file:
        return path.suffix in WEIGHT_SUFFIXES
    config = path / "config.json"
    if not is_directory:
        return False
    return not config.is_file() or read_json(config).get("model_type") in (None, MOBILECLIP_TYPE)


def _run_mobileclip(args: argparse.Namespace) -> None:
    for option, given in (("--vision-from", args.vision_from), ("--layout", args.layout)):
        if given:
            raise ConfigError(f"{option} is for FastVLM; leave it out for a MobileCLIP checkpoint")
    checkpoint = resolve_file(args.model, args.revision)
    files = file_states(checkpoint.path)

    def read() -> tuple[MobileCLIPConfig, Tensors]:
        return read_mobileclip(checkpoint, args.variant)

    with progress(f"reading {args.model}", quiet=args.quiet) as tell:
        config, tensors = read()
        text = config.text
        merges = None if text is None else read_merges(checkpoint.path, text.vocab_size)
        model = MobileCLIP(config)
        check_fit(model, tensors, checkpoint.name)
        layout = config.source.get("layout", "canonical")
        tell(f"read {args.model}, {config.variant}, layout {layout}")

    def write_words(directory: Path) -> None:
        if merges is not None:
            write_merges(directory, merges)

    def walk(read: Read, units: Units, samples: list[Sample]) -> Iterator[Seen]:
        words = read_clip_tokenizer(checkpoint, config)
        processor = ClipProcessor(config.preprocess, words)
        return walk_mobileclip(read, units, samples, processor)

    convert(
        args,
        Conversion(
            checkpoint=checkpoint,
            files=files,
            model=model,
            prefixes=MOBILECLIP_PARTS,
            usual_parts=tuple(MOBILECLIP_PARTS),
            read=read,
            arrange=lambda config, tensors: (config.to_json(), tensors),
            write_words=write_words,
            reread=lambda path: read_mobileclip(Checkpoint(path, str(path))),
            retrace=lambda config, tensors: retrace_mobileclip(checkpoint, config, tensors),
            walk=walk,
        ),
    )


def _run_fastvlm(args: argparse.Namespace) -> None:
    checkpoint = find_checkpoint(args.model, args.revision)
    files = file_states(checkpoint.path)

    def read() -> tuple[FastVLMConfig, Tensors]:
        return read_canonical(checkpoint, args.vision_from)

    with progress(f"reading {args.model}", quiet=args.quiet) as tell:
        config, tensors = read()
        words = read_tokenizer(checkpoint, config)
        model = FastVLM(config)
        check_fit(model, tensors, checkpoint.name)
        tell(f"read {args.model}, layout {config.source.get('layout', 'canonical')}")

    def arrange(config: FastVLMConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        if args.layout:
            return interchange.rewrite(config, tensors, args.layout, words)
        return config.to_json(), tensors

    def write_words(directory: Path) -> None:
        if args.layout:
            interchange.write_words(directory, config, args.layout, words)
        else:
            words.save(directory / "tokenizer.json")

    def retrace(config: FastVLMConfig, tensors: Tensors) -> Account:
        tower = None if args.vision_from is None else find_checkpoint(args.vision_from)
        return retrace_fastvlm(checkpoint, config, tensors, tower)

    def walk(read: Read, units: Units, samples: list[Sample]) -> Iterator[Seen]:
        return walk_fastvlm(read, units, samples, Processor(words, config))

    convert(
        args,
        Conversion(
            checkpoint=checkpoint,
            files=files,
            model=model,
            prefixes=FASTVLM_PARTS,
            usual_parts=tuple(FASTVLM_PARTS) if args.max_size else ("decoder",),
            read=read,
            arrange=arrange,
            write_words=write_words,
            reread=lambda path: read_canonical(Checkpoint(path, str(path))),
            retrace=retrace,
            walk=walk,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
