"""The conversion: read, choose what to quantise, write, verify, measure, upload."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_mobileclip.checkpoints.hub import is_repository
from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.device import DTYPES
from mlx_mobileclip.errors import CheckpointError, name_some
from mlx_mobileclip.models.clip import PreprocessConfig
from mlx_mobileclip.paths import user_path
from mlx_mobileclip.quantization import Quantization, QuantizedLayers, choose_layers
from mlx_mobileclip.terminal import Bar, progress, say

from .calibration import Sample, calibration_samples
from .export.runtimes import check_quantization
from .model_card import model_card, quality_table, quantization_summary
from .options import ConvertOptions, parse_size
from .quantize.mixed import BITS, bit_budget, group_by_module, mixed_quantization, sensitivities
from .quantize.quality import Size, checkpoint_size
from .quantize.stored import as_stored, dequantized
from .sources import ModelSource, check_unchanged, find_source
from .upload import check_repository, upload
from .verify.compare import check_errors, check_written, stage_errors, verify_report
from .write import check_target, copy_licence, new_directory, write_json, write_tensors


def convert(
    model: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str = "float16",
    variant: str | None = None,
    config: str | os.PathLike[str] | None = None,
    preprocess: PreprocessConfig | None = None,
    vision_from: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    q_parts: Sequence[str] | None = None,
    q_mixed: bool = False,
    max_size: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    dequantize: bool = False,
    verify: bool = False,
    upload_repo: str | None = None,
    quiet: bool = False,
) -> None:
    """Convert a FastVLM or MobileCLIP checkpoint of any known layout.

    The arguments are those of `python -m convert`, and are named like those of mlx_lm.convert.

    Args:
        model: Repository (`org/name`), directory, "demo" for the FastVLM that comes with the
            package, or, for MobileCLIP, a .pt, .bin or .safetensors file.
        mlx_path: Directory to create. It appears when it is complete.
        revision: Branch, tag or commit of the repository.
        dtype: "float16", "bfloat16" or "float32", of the weights that are not quantised.
        variant: MobileCLIP: published model with its architecture, if its name does not state it.
        config: MobileCLIP: JSON file that describes the checkpoint, in place of those beside it.
        preprocess: MobileCLIP: image preprocessing, in place of the checkpoint's settings.
        vision_from: FastVLM: checkpoint to take the image tower from, if it has none itself.
        layout: FastVLM: "mlx-vlm" or "transformers" to write the layout of that runtime.
        quantize: Quantise Linear and Embedding layers.
        q_bits: Bits per weight; by default the mode's, 4 for "affine".
        q_group_size: Weights that share a scale; by default the mode's, 64 for "affine".
        q_mode: "affine" (the default), "mxfp4", "mxfp8" or "nvfp4".
        q_parts: What to quantise: for FastVLM any of "decoder" (the default), "projector" and
            "vision", for MobileCLIP any of "image" and "text" (both by default).
        q_mixed: More bits for the layers that need them most.
        max_size: Size limit of the weights, such as "400MB", for mixed bits.
        calibration: Directory of images to measure the quantised model on; by default generated.
        dequantize: Write a quantised checkpoint as floats.
        verify: Read the written tensors back and compare each stage's output with the source's.
        upload_repo: Repository on the Hugging Face Hub to push the directory to.
        quiet: Print neither progress nor reports.

    Raises:
        ModelError: or one of its subclasses, such as ConfigError for options that exclude each
            other. Nothing is left behind, unless only the upload has failed.
    """
    mlx_path = user_path(mlx_path)
    calibration = None if calibration is None else user_path(calibration)
    options = ConvertOptions(**locals())  # its fields are these parameters
    run(options, options.command_line())


def run(options: ConvertOptions, command_line: Sequence[str]) -> None:
    """Convert a checkpoint.

    Args:
        options: What to convert, and how.
        command_line: Arguments of `python -m convert` to show in the model card.

    Raises:
        ModelError: see `convert`.
    """
    samples: list[Sample] = []
    if options.quantize or options.verify:
        samples = calibration_samples(options.calibration)
    if options.upload_repo:
        check_repository(options.upload_repo)
    check_target(options.mlx_path)
    source_class, checkpoint = find_source(options)
    with progress(f"reading {options.model}", quiet=options.quiet) as set_status:
        source = source_class(checkpoint, options)
        set_status(f"read {options.model}, {source.description}")
    layers, skipped = (
        _choose_quantization(source, options, samples) if options.quantize else ({}, [])
    )
    with progress(f"writing {options.mlx_path}", quiet=options.quiet) as set_status:
        try:
            with new_directory(options.mlx_path) as directory:
                size, reports = _write(directory, source, options, layers, samples, command_line)
                check_unchanged(source)
        except CheckpointError:
            check_unchanged(source)  # a changed source explains the error
            raise
        set_status(f"wrote {options.mlx_path}: {size.disk_bytes / 1e6:,.1f} MB of weights")
    if skipped:
        names = name_some(skipped)
        reports.append(f"not quantised, as the group size does not divide their width: {names}")
    if reports and not options.quiet:
        say("\n".join(reports), keep="\n")
    if options.upload_repo:
        with progress(f"uploading to {options.upload_repo}", quiet=options.quiet) as set_status:
            set_status(f"uploaded: {upload(options.mlx_path, options.upload_repo)}")


def _choose_quantization(
    source: ModelSource, options: ConvertOptions, samples: list[Sample]
) -> tuple[QuantizedLayers, list[str]]:
    """Return the quantisation of each layer, and the layers skipped for their width."""
    fewest = BITS[0] if options.max_size else None
    bits = fewest if options.q_bits is None else options.q_bits
    quantization = Quantization.of(options.q_mode or "affine", bits, options.q_group_size)
    parts = options.q_parts or source.default_parts
    layers, skipped = choose_layers(source.model, source.parts, parts, quantization)
    if options.layout:
        check_quantization(options.layout, layers)  # before the slow measurements
    if options.mixed:
        dtype = DTYPES[options.dtype]
        max_bytes = None if options.max_size is None else parse_size(options.max_size)
        budget = bit_budget(source.model, layers, dtype, max_bytes)
        with Bar(len(group_by_module(layers)), "modules measured", quiet=options.quiet) as bar:
            costs = sensitivities(source.run_stages, source.read, layers, samples, bar)
        layers = mixed_quantization(source.model, layers, dtype, costs, budget)
    return layers, skipped


def _write(
    directory: Path,
    source: ModelSource,
    options: ConvertOptions,
    layers: QuantizedLayers,
    samples: list[Sample],
    command_line: Sequence[str],
) -> tuple[Size, list[str]]:
    """Write, verify and measure the checkpoint; returns its size and reports for the user."""
    config, tensors = _stored(source, options, layers)
    weights = sum(parameter.size for parameter in named_parameters(source.model).values())
    size = checkpoint_size(weights, tensors, config)
    values, tensors = source.to_target_layout(config, tensors)
    write_tensors(directory, tensors)
    write_json(directory / "config.json", values)
    source.write_tokenizer(directory)
    name, revision = source.checkpoint.name, source.checkpoint.revision
    origin = f"{name}, commit {revision}" if revision else name
    change = _describe_changes(config.source.get("vision_from"), options, bool(layers))
    reports, quality = list[str](), ""
    if left_out := copy_licence(source.checkpoint.path, directory, origin, change):
        reports.append(
            f"not copied, as they are links to elsewhere, not files, or too large: "
            f"{name_some(left_out)}; add the licence yourself"
        )
    read_converted = partial(source.read_converted, directory)
    if options.verify:
        _, expected = source.to_target_layout(*_stored(source, options, layers))
        count = check_written(directory, expected)
        errors = stage_errors(source.run_stages, source.read, read_converted, samples[0])
        is_quantized = bool(config.quantization)
        check_errors(errors, DTYPES[options.dtype], is_quantized, options.mlx_path)
        reports.append(f"{verify_report(count, errors)}\n")
    if layers:
        cost = source.quality(source.run_stages, source.read, read_converted, samples)
        quality = quality_table(size, cost)
        reports.append(f"{quantization_summary(layers, options.dtype)}\n\n{quality}")
    card = model_card(
        name=options.mlx_path.name,
        kind=source.kind,
        source=origin,
        base_model=name if is_repository(options.model) else None,
        quantized=config.quantization,
        dtype=options.dtype,
        quality=quality,
        command_line=command_line,
    )
    (directory / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return size, reports


def _stored(
    source: ModelSource, options: ConvertOptions, layers: QuantizedLayers
) -> tuple[Any, Tensors]:
    """Canonical config and lazy tensors in the form to write."""
    config, tensors = source.read()
    if options.dequantize:
        tensors = dequantized(tensors, config.quantization)
        config = replace(config, quantization={})
    if layers:
        config = replace(config, quantization=layers)
    return config, as_stored(tensors, DTYPES[options.dtype], layers)


def _describe_changes(vision_from: str | None, options: ConvertOptions, quantized: bool) -> str:
    """Describe the changes to the weights, for the notice."""
    tower = f"Image tower taken from: {vision_from}\n" if vision_from else ""
    form = f"{options.layout}'s layout" if options.layout else "MLX"
    suffix = ", quantised" if quantized else ""
    return f"{tower}Changes: folded and re-arranged for {form}, stored as {options.dtype}{suffix}."
