"""`classify`: find the labels that fit an image best."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..embedding.files import read_lines
from ..errors import DataError
from ..terminal import printable
from .loading import embed_labels, load_model
from .options import add_model_arguments, add_template_arguments, templates

if TYPE_CHECKING:
    from ..eval.zero_shot import Prediction

HELP = "tell which label fits an image best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--image", action="append", required=True, metavar="P", help="again: more")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="A,B,C", help="labels, separated by commas")
    labels.add_argument("--labels-file", type=Path, metavar="F", help="file with a label a line")
    labels.add_argument("--imagenet", action="store_true", help="the 1000 classes of ImageNet")
    add_template_arguments(parser)
    parser.add_argument(
        "--top-k", type=int, default=5, metavar="N", help="labels to show (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Classify the images and print the best labels of each.

    Raises:
        ModelError: an option, an image, or the model cannot be used.
    """
    from ..eval.zero_shot import classify
    from ..preprocess.image import open_image

    labels, prompts = _labels(args), templates(args)
    if args.top_k < 1:
        raise DataError(f"--top-k {args.top_k}: ask for at least 1 label")
    for path in args.image:
        open_image(path)  # report a wrong path before the model is loaded
    model, processor = load_model(args)
    texts = embed_labels(model, processor, labels, prompts, quiet=args.quiet)
    results = classify(model, processor, args.image, labels, texts=texts, top_k=args.top_k)
    if args.json:
        images = [
            {"image": path, "predictions": [asdict(p) for p in best]}
            for path, best in zip(args.image, results, strict=True)
        ]
        print(json.dumps({"model": args.model, "templates": prompts, "results": images}))
        return
    for path, best in zip(args.image, results, strict=True):
        if len(args.image) > 1:
            print(printable(path))
        print("\n".join(map(_line, best)), flush=True)


def _labels(args: argparse.Namespace) -> list[str]:
    from ..eval.zero_shot import imagenet_classes

    if args.imagenet:
        return list(imagenet_classes())
    lines = read_lines(args.labels_file) if args.labels_file else args.labels.split(",")
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise DataError(f"{args.labels_file or '--labels'}: no labels; give at least one")
    return labels


def _line(prediction: "Prediction") -> str:
    label = printable(prediction.label)
    return f"{100 * prediction.probability:5.1f} %  {prediction.similarity:6.3f}  {label}"
