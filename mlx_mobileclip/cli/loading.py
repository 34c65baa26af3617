"""Load the model and embed the labels that the options name, with progress on stderr."""

import argparse
import json
import os
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..json_fields import Fields
from ..terminal import Bar, progress

if TYPE_CHECKING:
    import mlx.core as mx

    from ..models.clip import MobileCLIP, PreprocessConfig
    from ..preprocess.processor import Processor

BAR_FROM_PROMPTS = 512  # fewer are embedded in a moment


def load_model(args: argparse.Namespace) -> "tuple[MobileCLIP, Processor]":
    """Load the model that the options name; a note on stderr says if MLX is slow here.

    Raises:
        ModelError: the model cannot be used, or --preprocess is malformed.
    """
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from ..cpu.process import slow_blas_remedy

    options = {name: getattr(args, name) for name in ("variant", "revision", "dtype", "config")}
    options["preprocess"] = None if args.preprocess is None else _preprocess(args.preprocess)
    with progress(f"loading {args.model}", quiet=args.quiet) as set_status:
        from .. import load

        loaded = load(args.model, **options)
        set_status(f"loaded {args.model}")
    if not args.quiet and (remedy := slow_blas_remedy()):
        print(f"note: {remedy}", file=sys.stderr)
    return loaded


def _preprocess(text: str) -> "PreprocessConfig":
    from ..models.clip import PreprocessConfig

    names = [field.name for field in fields(PreprocessConfig)]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--preprocess: is not JSON ({error})") from error
    if not isinstance(values, dict) or set(values) != set(names):
        raise ConfigError(f"--preprocess: give an object of {', '.join(names)}")
    return PreprocessConfig.from_json(Fields(values, "--preprocess"))


def embed_labels(
    model: "MobileCLIP",
    processor: "Processor",
    labels: list[str],
    templates: tuple[str, ...],
    *,
    quiet: bool,
) -> "mx.array":
    """`text_matrix` of K labels, float32 (K, E), with a bar if there are many prompts."""
    from ..eval.zero_shot import text_matrix

    few = len(labels) * len(templates) < BAR_FROM_PROMPTS
    with Bar(len(labels), "labels", quiet=quiet or few) as bar:
        return text_matrix(model, processor, labels, templates, on_progress=bar.advance)
