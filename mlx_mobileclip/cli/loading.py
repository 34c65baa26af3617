"""Load the model and embed the labels, with progress on stderr."""

import argparse
from typing import TYPE_CHECKING

from ..terminal import Bar, hide_download_progress, progress, say
from .options import model_options

if TYPE_CHECKING:
    import mlx.core as mx

    from ..models.clip import MobileCLIP
    from ..preprocess.processor import Processor

MIN_PROMPTS_FOR_BAR = 512  # fewer are embedded too quickly for a progress bar


def load_model(args: argparse.Namespace) -> "tuple[MobileCLIP, Processor]":
    """Load the model that options name; prints a note if MLX uses a slow BLAS.

    Raises:
        ModelError: the model cannot be used.
    """
    if args.quiet:
        hide_download_progress()
    from ..cpu.process import slow_blas_remedy

    with progress(f"loading {args.model}", quiet=args.quiet) as set_status:
        from .. import load

        loaded = load(args.model, **model_options(args))
        set_status(f"loaded {args.model}")
    if not args.quiet and (remedy := slow_blas_remedy()):
        say(f"note: {remedy}")
    return loaded


def embed_labels(
    model: "MobileCLIP",
    processor: "Processor",
    labels: list[str],
    templates: tuple[str, ...],
    *,
    quiet: bool,
) -> "mx.array":
    """Embed K labels, float32 (K, E), with a progress bar if there are many prompts."""
    from ..eval.zero_shot import build_zero_shot_classifier

    few = len(labels) * len(templates) < MIN_PROMPTS_FOR_BAR
    with Bar(len(labels), "labels", quiet=quiet or few) as bar:
        return build_zero_shot_classifier(
            model, processor, labels, templates, on_progress=bar.advance
        )
