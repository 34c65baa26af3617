"""`classify`: find the labels that match an image best."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..embedding.lines import read_lines
from ..errors import DataError
from ..paths import user_path
from ..terminal import printable, say
from .inputs import find_all_images
from .loading import embed_labels, load_model
from .options import (
    add_batch_size_argument,
    add_model_arguments,
    add_template_arguments,
    templates,
)

if TYPE_CHECKING:
    from ..embedding.pipeline import Embedded
    from ..eval.zero_shot import Prediction

    Result = tuple[str, list[Prediction]]

HELP = "find the labels that match an image best"
EXAMPLES = (
    'mlx-mobileclip classify --model demo --image examples/scene.png --labels "blue heart,star"',
    "mlx-mobileclip classify --model demo --image examples --labels heart,star --format csv",
)
COLUMNS = ("image", "rank", "label", "index", "probability", "similarity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    parser.add_argument(
        "--image",
        action="append",
        required=True,
        metavar="SRC",
        help="image, directory (searched recursively), glob, or file with one path per line; "
        "may be repeated",
    )
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="A,B,C", help="labels, separated by commas")
    labels.add_argument("--label", action="append", metavar="L", help="one label; may be repeated")
    labels.add_argument(
        "--labels-file", type=user_path, metavar="F", help="file with one label per line"
    )
    labels.add_argument("--imagenet", action="store_true", help="the 1000 classes of ImageNet")
    add_template_arguments(parser)
    parser.add_argument(
        "--top-k", type=int, default=5, metavar="N", help="labels to show (default: %(default)s)"
    )
    add_batch_size_argument(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="table",
        help="table, one JSON object, or one line per image (jsonl) or label (csv); "
        "default: %(default)s",
    )
    output.add_argument(
        "--json", action="store_const", const="json", dest="format", help="same as --format json"
    )


def run(args: argparse.Namespace) -> None:
    """Classify the images and print the best labels of each.

    Raises:
        DataError: some images were skipped (results of the others are printed), or all were.
        ModelError: an option or the model cannot be used.
    """
    from ..embedding.pipeline import check_batch_size, iter_embeddings
    from ..eval.zero_shot import predict
    from ..preprocess.image import open_image

    labels, prompts = _labels(args), templates(args)
    if args.top_k < 1:
        raise DataError(f"--top-k {args.top_k}: ask for at least 1 label")
    check_batch_size(args.batch_size)
    paths, unreadable = find_all_images(args.image)
    if len(paths) == 1:
        open_image(paths[0])  # report an unreadable image before the model is loaded
    model, processor = load_model(args)
    classifier = embed_labels(model, processor, labels, prompts, quiet=args.quiet)
    skipped: list[str] = []

    def results(embedded: "Iterable[Embedded]") -> "Iterator[Result]":
        import mlx.core as mx

        for item in embedded:
            if item.row is not None:
                row = mx.array(item.row)[None]
                yield item.name, predict(model, row, classifier, labels, args.top_k)[0]
                continue
            skipped.append(item.name)
            where = "" if item.name in str(item.error) else f"{item.name}: "
            say(f"skipped {where}{item.error}")

    with closing(iter_embeddings(model, processor, paths, batch_size=args.batch_size)) as embedded:
        FORMATS[args.format](results(embedded), args, len(paths))
    if len(skipped) == len(paths):
        raise DataError(f"none of the {len(paths)} images could be classified")
    if count := len(skipped) + unreadable:
        classified = len(paths) - len(skipped)
        raise DataError(
            f"classified {classified} of {len(paths)} images; skipped the {count} named above"
        )


def _labels(args: argparse.Namespace) -> list[str]:
    from ..eval.zero_shot import imagenet_classes

    if args.imagenet:
        return list(imagenet_classes())
    lines = read_lines(args.labels_file) if args.labels_file else args.label
    lines = args.labels.split(",") if lines is None else lines
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise DataError(f"{args.labels_file or '--labels'}: no labels; give at least one")
    return labels


def _print_table(results: "Iterable[Result]", _: argparse.Namespace, count: int) -> None:
    for path, predictions in results:
        if count > 1:
            print(printable(path))
        for p in predictions:
            label = printable(p.label)
            print(f"{100 * p.probability:5.1f} %  {p.similarity:6.3f}  {label}")
        sys.stdout.flush()


def _print_json(results: "Iterable[Result]", args: argparse.Namespace, _: int) -> None:
    images = [_as_json(path, predictions) for path, predictions in results]
    report = {"model": args.model, "templates": templates(args), "results": images}
    print(json.dumps(report))


def _print_json_lines(results: "Iterable[Result]", _: argparse.Namespace, __: int) -> None:
    for path, predictions in results:
        print(json.dumps(_as_json(path, predictions)), flush=True)


def _print_csv(results: "Iterable[Result]", _: argparse.Namespace, __: int) -> None:
    print(_csv_line(COLUMNS))
    for path, predictions in results:
        for rank, p in enumerate(predictions, 1):
            print(_csv_line((path, rank, p.label, p.index, p.probability, p.similarity)))
        sys.stdout.flush()


def _csv_line(values: tuple[object, ...]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    # Control characters are kept for programs but removed on a terminal.
    return printable(line.getvalue(), keep="" if sys.stdout.isatty() else CONTROLS)


def _as_json(path: str, predictions: "list[Prediction]") -> dict[str, object]:
    return {"image": path, "predictions": [asdict(prediction) for prediction in predictions]}


CONTROLS = "".join(map(chr, (*range(32), *range(127, 160))))
FORMATS = {
    "table": _print_table,
    "json": _print_json,
    "jsonl": _print_json_lines,
    "csv": _print_csv,
}
