"""From a source that is open to a directory that is complete: recipe, writing, checks, card."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_fastvlm.model import FastVLM
from mlx_mobileclip.checkpoint import named_parameters
from mlx_mobileclip.command import Bar, progress
from mlx_mobileclip.device import DTYPES
from mlx_mobileclip.errors import CheckpointError, name_some
from mlx_mobileclip.hub import Checkpoint, is_repository
from mlx_mobileclip.quantization import Packed, Quantization, choose

from . import interchange
from .card import Making, card, recipe, table
from .quality import agreement, closeness, size
from .quantize import Tensors, as_stored, unpacked
from .recipe import STEPS, mixed, room, sensitivities, units_of
from .retrace import Account
from .verify import as_before, check_errors, compare, report, stage_errors
from .walk import Read, Walk
from .write import copy_licence, file_states, write_checkpoint


@dataclass(frozen=True)
class Conversion:
    """What is done differently for FastVLM and MobileCLIP.

    Attributes:
        checkpoint: Where the source lies.
        files: What state its files were in before any was read.
        model: Of the source's shapes; its weights are never looked at.
        prefixes: Where its parts lie.
        usual_parts: Which of them -q packs.
        read: Config and lazy tensors of the source, anew with each call.
        arrange: From these to what is written: contents of config.json, lazy tensors.
        write_words: Writes the tokenizer's files.
        reread: Config and lazy tensors of what was written.
        retrace: Finds the source's tensors again in such tensors.
        walk: Through such a model.
    """

    checkpoint: Checkpoint
    files: dict[str, tuple[int, int]]
    model: Any
    prefixes: dict[str, str]
    usual_parts: tuple[str, ...]
    read: Read
    arrange: Callable[[Any, Tensors], tuple[dict[str, Any], Tensors]]
    write_words: Callable[[Path], None]
    reread: Callable[[Path], tuple[Any, Tensors]]
    retrace: Callable[[Any, Tensors], Account]
    walk: Walk

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file of the source is not as it was when reading began."""
        now = file_states(self.checkpoint.path)
        if changed := [name for name, state in self.files.items() if now.get(name) != state]:
            raise CheckpointError(
                f"{self.checkpoint.name}: {changed[0]} was changed while it was read; convert again"
            )


def _recipe(args: argparse.Namespace, conversion: Conversion) -> tuple[Packed, list[str]]:
    """Which layers to pack and how; and those that cannot be."""
    fewest = STEPS[0] if args.max_size else None
    bits = fewest if args.q_bits is None else args.q_bits
    packing = Quantization.of(args.q_mode or "affine", bits, args.q_group_size)
    parts = args.q_parts or conversion.usual_parts
    packed, skipped = choose(conversion.model, conversion.prefixes, parts, packing)
    if args.layout:
        interchange.check_target(args.layout, packed)  # before measuring, which takes long
    if args.q_mixed:
        dtype, model = DTYPES[args.dtype], conversion.model
        spare = room(model, packed, dtype, args.max_bytes)
        with Bar(len(units_of(packed)), "units measured", quiet=args.quiet) as bar:
            walk, read, shown = conversion.walk, conversion.read, args.samples
            costs = sensitivities(walk, read, packed, shown, bar)
        packed = mixed(model, packed, dtype, costs, spare)
    return packed, skipped


def convert(args: argparse.Namespace, conversion: Conversion) -> None:
    """Write the directory that the options ask for.

    Args:
        args: Options of `python -m convert`.
        conversion: What to convert.

    Raises:
        ModelError: or one of its subclasses; nothing is left behind.
    """
    checkpoint, model, read = conversion.checkpoint, conversion.model, conversion.read
    packed, skipped = _recipe(args, conversion) if args.quantize else ({}, [])

    def stored() -> tuple[Any, Tensors]:
        config, tensors = read()
        held = {} if args.dequantize else config.quantization
        floats = unpacked(tensors, config.quantization) if args.dequantize else tensors
        result = as_stored(floats, DTYPES[args.dtype], packed)
        return replace(config, quantization=packed or held), result

    config, tensors = stored()
    graft = config.source.get("vision_from")
    change = f"Image tower taken from: {graft}\n" if graft else ""
    form = f"{args.layout}'s layout" if args.layout else "MLX"
    change += f"Changes: folded and re-arranged for {form}, stored as {args.dtype}"
    if packed:
        change += ", quantised"
    sizes = size(sum(t.size for t in named_parameters(model).values()), tensors, config)
    values, tensors = conversion.arrange(config, tensors)
    quality = verified = ""

    def other_files(directory: Path) -> None:
        nonlocal quality, verified

        def written() -> tuple[Any, Tensors]:
            return conversion.reread(directory)

        conversion.write_words(directory)
        copy_licence(checkpoint.path, directory, _described(checkpoint), change + ".")
        if args.verify:
            compare(directory, conversion.arrange(*stored())[1])
            held, original = read()
            repacked = held.quantization if args.dequantize else packed
            ours, result = written()
            before = as_stored(original, DTYPES[args.dtype], {})
            account = conversion.retrace(ours, as_before(result, before, repacked))
            errors = stage_errors(conversion.walk, read, written, args.samples[0])
            check_errors(errors, DTYPES[args.dtype], bool(config.quantization), args.mlx_path)
            verified = report(account, errors, len(repacked))
        if packed:
            compared = agreement if isinstance(model, FastVLM) else closeness
            quality = table(sizes, compared(conversion.walk, read, written, args.samples))
        conversion.check_unchanged()
        making = Making(
            name=args.mlx_path.name,
            source=_described(checkpoint),
            base_model=checkpoint.name if is_repository(args.model) else None,
            is_fastvlm=isinstance(model, FastVLM),
            dtype=args.dtype,
            arguments=args.arguments,
        )
        text = card(making, config.quantization, quality)
        (directory / "README.md").write_text(text, encoding="utf-8", errors="replace")

    with progress(f"writing {args.mlx_path}", quiet=args.quiet) as tell:
        try:
            write_checkpoint(args.mlx_path, values, tensors, other_files)
        except CheckpointError:
            conversion.check_unchanged()  # which would be why
            raise
        tell(f"wrote {args.mlx_path}: {sizes.disk_bytes / 1e6:,.1f} MB of weights")
    if verified and not args.quiet:
        print(f"{verified}\n", file=sys.stderr)
    if quality and not args.quiet:
        print(f"{recipe(packed, args.dtype)}\n\n{quality}", file=sys.stderr)
    if skipped and not args.quiet:
        print(
            f"not quantised, as their width is no multiple of the group size: {name_some(skipped)}",
            file=sys.stderr,
        )


def _described(checkpoint: Checkpoint) -> str:
    revision = checkpoint.revision
    return f"{checkpoint.name}, commit {revision}" if revision else checkpoint.name
