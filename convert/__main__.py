"""Convert a checkpoint of any known layout: `python -m convert --model SRC --mlx-path DST`."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fastvlm.config import QUANTIZATION_MODES, FastVLMConfig, Quantization
from mlx_fastvlm.loader import find_checkpoint, read_canonical, read_tokenizer
from mlx_fastvlm.model import FastVLM
from mlx_mobileclip.checkpoint import Fields, assign, named_parameters, read_json, read_tensors
from mlx_mobileclip.clip import MODEL_TYPE as MOBILECLIP_TYPE
from mlx_mobileclip.clip import MobileCLIP
from mlx_mobileclip.command import progress, run_command
from mlx_mobileclip.errors import CheckpointError, ConfigError
from mlx_mobileclip.hub import DEMO, WEIGHT_SUFFIXES, Checkpoint, look, resolve_file
from mlx_mobileclip.loader import DTYPES
from mlx_mobileclip.loader import read_canonical as read_mobileclip
from mlx_mobileclip.tokenizer import read_merges, write_merges
from mlx_mobileclip.variants import published_variant

from .write import check_target, copy_licence, write_checkpoint


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m convert`; names follow mlx-lm's."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
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
        "-q", "--quantize", action="store_true", help="quantise the decoder and its embedding"
    )
    parser.add_argument("--q-bits", type=int, metavar="B", help="bits per weight (default: 4)")
    parser.add_argument(
        "--q-group-size", type=int, metavar="G", help="weights that share a scale (default: 64)"
    )
    parser.add_argument(
        "--q-mode",
        choices=sorted(QUANTIZATION_MODES),
        help="default: affine",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read back what was written and compare every bit"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    if not args.quantize and (args.q_bits or args.q_group_size or args.q_mode):
        raise ConfigError("--q-bits, --q-group-size and --q-mode need -q; add it")
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    check_target(args.mlx_path)
    if _is_mobileclip(args.model, args.variant):
        _run_mobileclip(args)
    else:
        _run_fastvlm(args)


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
    if args.quantize or args.vision_from:
        option = "--quantize" if args.quantize else "--vision-from"
        raise ConfigError(f"{option} is for FastVLM; leave it out for a MobileCLIP checkpoint")
    checkpoint = resolve_file(args.model, args.revision)
    with progress(f"reading {args.model}", quiet=args.quiet) as tell:
        config, tensors = read_mobileclip(checkpoint, args.variant)
        text = config.text
        merges = None if text is None else read_merges(checkpoint.path, text.vocab_size)
        model = MobileCLIP(config)
        assign(model, tensors, DTYPES[args.dtype], checkpoint.name)
        layout = config.source.get("layout", "canonical")
        tell(f"read {args.model}, {config.variant}, layout {layout}")

    def write_words(directory: Path) -> None:
        if merges is not None:
            write_merges(directory, merges)

    _write(args, checkpoint, config.to_json(), model, write_words)


def _run_fastvlm(args: argparse.Namespace) -> None:
    packing = _packing(args) if args.quantize else None
    checkpoint = find_checkpoint(args.model, args.revision)
    with progress(f"reading {args.model}", quiet=args.quiet) as tell:
        config, tensors = read_canonical(checkpoint, args.vision_from)
        words = read_tokenizer(checkpoint, config)
        model = FastVLM(config)
        assign(model, tensors, DTYPES[args.dtype], checkpoint.name)
        tell(f"read {args.model}, layout {config.source.get('layout', 'canonical')}")
    if packing is not None:
        config = quantize(model, config, packing)

    def write_words(directory: Path) -> None:
        words.save(directory / "tokenizer.json")

    _write(args, checkpoint, config.to_json(), model, write_words, packing)


def _write(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    model: nn.Module,
    write_words: Callable[[Path], None],
    packing: Quantization | None = None,
) -> None:
    graft = config["source"].get("vision_from")
    change = f"Image tower taken from: {graft}\n" if graft else ""
    change += f"Changes: folded and re-arranged for MLX, stored as {args.dtype}"
    change += f", decoder quantised to {packing.bits} bits." if packing else "."
    with progress(f"writing {args.mlx_path}", quiet=args.quiet) as tell:
        weights = named_parameters(model)
        size_bytes = sum(tensor.nbytes for tensor in weights.values())

        def other_files(directory: Path) -> None:
            write_words(directory)
            copy_licence(checkpoint.path, directory, _described(checkpoint), change)
            if args.verify:
                _verify(directory, model)

        write_checkpoint(args.mlx_path, config, weights, other_files)
        tell(f"wrote {args.mlx_path}: {size_bytes / 1e9:.2f} GB of weights")


def _verify(directory: Path, model: nn.Module) -> None:
    """Raise CheckpointError unless the directory holds the model's weights, bit by bit."""
    written = read_tensors(directory)
    for name, weight in named_parameters(model).items():
        if name not in written or not mx.array_equal(written[name], weight).item():
            raise CheckpointError(f"{directory}: {name} was not written as it is; try another disk")


def _described(checkpoint: Checkpoint) -> str:
    revision = checkpoint.revision
    return f"{checkpoint.name}, commit {revision}" if revision else checkpoint.name


def _packing(args: argparse.Namespace) -> Quantization:
    mode = args.q_mode or "affine"
    bits, group_sizes = QUANTIZATION_MODES[mode]
    fields = {
        "mode": mode,
        "bits": args.q_bits if args.q_bits is not None else (4 if 4 in bits else bits[0]),
        "group_size": args.q_group_size
        if args.q_group_size is not None
        else (64 if 64 in group_sizes else group_sizes[0]),
    }
    return Quantization.from_json(Fields(fields, "quantization"))


def quantize(model: FastVLM, config: FastVLMConfig, packing: Quantization) -> FastVLMConfig:
    """Quantise the decoder and its embedding in place; returns the config that says so.

    Raises:
        ConfigError: the model is quantised already, or a layer's width has no whole groups.
    """
    if config.quantization:
        raise ConfigError("the model is quantised already; convert the original instead")
    packed: dict[str, Quantization] = {}

    def pick(path: str, layer: nn.Module) -> bool:
        if not path.startswith("language_model.") or not hasattr(layer, "to_quantized"):
            return False
        width = layer.weight.shape[-1]
        if width % packing.group_size:
            raise ConfigError(
                f"{path} is {width} wide, no multiple of {packing.group_size}; "
                "choose another --q-group-size"
            )
        packed[path] = packing
        return True

    nn.quantize(model, **asdict(packing), class_predicate=pick)
    mx.eval(model.parameters())
    return replace(config, quantization=packed)


if __name__ == "__main__":
    sys.exit(main())
