"""The command line: `python -m mlx_mobileclip classify|embed|evaluate`, `mlx-mobileclip`.

stdout carries the result and nothing else; all the rest is on stderr.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .command import Bar, printable, progress, run_command
from .errors import DataError

if TYPE_CHECKING:
    import mlx.core as mx

    from .clip import MobileCLIP
    from .processor import Processor
    from .zeroshot import Prediction

DEFAULT_MODEL = "apple/MobileCLIP2-S0"
BAR_FROM_PROMPTS = 512  # fewer are embedded in a moment


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_mobileclip",
        description="Classify and embed images and texts with Apple's MobileCLIP, natively in MLX.",
        epilog="The result goes to stdout, progress to stderr. "
        "Exit status: 0 done, 1 error or something skipped, 2 usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_classify(commands.add_parser("classify", help="tell which label fits an image best"))
    _add_embed(commands.add_parser("embed", help="write embeddings of images or texts to a file"))
    _add_evaluate(commands.add_parser("evaluate", help="measure accuracy on a data set"))
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="repository on Hugging Face, checkpoint directory or file, or demo, the small model "
        "that comes with this package (default: %(default)s)",
    )
    parser.add_argument("--variant", metavar="V", help="such as MobileCLIP2-S0, if M does not tell")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="default: float16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no statistics")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_templates(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--template",
        action="append",
        metavar="T",
        help='prompt with {} for the label; again for more, which are averaged (default: "a photo '
        'of a {}."; for ImageNet the 80 of --templates openai)',
    )
    how.add_argument("--templates", choices=("openai", "simple"), help="a published set of prompts")


def _add_classify(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--image", action="append", required=True, metavar="P", help="again: more")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="A,B,C", help="labels, separated by commas")
    labels.add_argument("--labels-file", type=Path, metavar="F", help="file with a label a line")
    labels.add_argument("--imagenet", action="store_true", help="the 1000 classes of ImageNet")
    _add_templates(parser)
    parser.add_argument(
        "--top-k", type=int, default=5, metavar="N", help="labels to show (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_classify)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--images",
        nargs="+",
        metavar="SRC",
        help="directory (searched recursively), glob, image, or file with a path a line",
    )
    what.add_argument("--texts", type=Path, metavar="FILE", help="file with a text a line")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="X", help=".safetensors, .npz or .parquet"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="default: %(default)s"
    )
    parser.set_defaults(run=_embed)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--imagenet",
        type=Path,
        metavar="DIR",
        help="validation images in one directory a class, 1000 in the order of their WordNet ids",
    )
    data.add_argument(
        "--captions",
        type=Path,
        metavar="JSON",
        help="Karpathy's dataset_coco.json or dataset_flickr30k.json; its test split is used",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="the captions' images")
    _add_templates(parser)
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_evaluate)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: args.run(args), debug=args.debug)


def _load(args: argparse.Namespace) -> "tuple[MobileCLIP, Processor]":
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with progress(f"loading {args.model}", quiet=args.quiet) as tell:
        from . import load

        loaded = load(args.model, variant=args.variant, revision=args.revision, dtype=args.dtype)
        tell(f"loaded {args.model}")
    return loaded


def _templates(args: argparse.Namespace) -> tuple[str, ...]:
    from .zeroshot import PLAIN_TEMPLATE, template_set

    if args.template:
        return tuple(args.template)
    if args.templates or args.imagenet:
        return template_set(args.templates or "openai")
    return PLAIN_TEMPLATE


def _labels(args: argparse.Namespace) -> list[str]:
    from .embed import read_lines
    from .zeroshot import imagenet_classes

    if args.imagenet:
        return list(imagenet_classes())
    lines = read_lines(args.labels_file) if args.labels_file else args.labels.split(",")
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise DataError(f"{args.labels_file or '--labels'}: no labels; give at least one")
    return labels


def _text_matrix(
    args: argparse.Namespace,
    model: "MobileCLIP",
    processor: "Processor",
    labels: list[str],
    templates: tuple[str, ...],
) -> "mx.array":
    from .zeroshot import text_matrix

    few = len(labels) * len(templates) < BAR_FROM_PROMPTS
    with Bar(len(labels), "labels", quiet=args.quiet or few) as bar:
        return text_matrix(model, processor, labels, templates, on_progress=bar.advance)


def _classify(args: argparse.Namespace) -> None:
    from .image import open_image
    from .zeroshot import classify

    labels, templates = _labels(args), _templates(args)
    if args.top_k < 1:
        raise DataError(f"--top-k {args.top_k}: ask for at least 1 label")
    for path in args.image:
        open_image(path)  # before the model is loaded: a wrong path is told at once
    model, processor = _load(args)
    texts = _text_matrix(args, model, processor, labels, templates)
    results = classify(model, processor, args.image, labels, texts=texts, top_k=args.top_k)
    if args.json:
        images = [
            {"image": path, "predictions": [asdict(p) for p in best]}
            for path, best in zip(args.image, results, strict=True)
        ]
        print(json.dumps({"model": args.model, "templates": templates, "results": images}))
        return
    for path, best in zip(args.image, results, strict=True):
        if len(args.image) > 1:
            print(printable(path))
        print("\n".join(map(_line, best)), flush=True)


def _line(prediction: "Prediction") -> str:
    label = printable(prediction.label)
    return f"{100 * prediction.probability:5.1f} %  {prediction.similarity:6.3f}  {label}"


def _embed(args: argparse.Namespace) -> None:
    from .embed import (
        check_names,
        check_output,
        embed_images,
        embed_texts,
        find_images,
        read_lines,
    )

    unread: set[str] = set()

    def skip(folder: str, reason: str) -> None:
        if folder not in unread:
            print(printable(f"skipped {folder}: {reason}"), file=sys.stderr)
        unread.add(folder)

    check_output(args.output)
    if args.images:
        items = [path for source in args.images for path in find_images(source, skip)]
    else:
        items = read_lines(args.texts)
        if not items:
            raise DataError(f"{args.texts}: holds no text; write one a line")
    check_names(args.output, items)
    model, processor = _load(args)
    started = time.perf_counter()
    run = embed_images if args.images else embed_texts
    try:
        summary = run(
            model,
            processor,
            items,
            args.output,
            name=args.model,
            batch_size=args.batch_size,
            quiet=args.quiet,
        )
    except KeyboardInterrupt:
        print("run the same command again to go on from there", file=sys.stderr)
        raise
    what = "images" if args.images else "texts"
    told = f"embedded {summary.embedded} of {summary.total} {what} into {args.output}"
    if skipped := len(summary.skipped) + len(unread):
        raise DataError(f"{told}; skipped the {skipped} named above")
    if not args.quiet:
        seconds = time.perf_counter() - started
        rate = (summary.embedded - summary.resumed) / seconds
        print(f"{told} ({seconds:.1f} s, {rate:.1f} {what}/s)", file=sys.stderr)


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluate import evaluate_imagenet, evaluate_retrieval, imagenet_images, karpathy_test

    figures: dict[str, Any]
    if args.captions and (args.template or args.templates):
        raise DataError("--captions takes no --template and no --templates; leave them out")
    if args.imagenet and args.images:
        raise DataError("--imagenet takes no --images; its DIR holds the images")
    if args.imagenet:
        paths, targets = imagenet_images(args.imagenet)
        templates = _templates(args)
        model, processor = _load(args)
        from .zeroshot import imagenet_classes

        texts = _text_matrix(args, model, processor, list(imagenet_classes()), templates)
        figures = evaluate_imagenet(
            model, processor, paths, targets, texts, batch_size=args.batch_size, quiet=args.quiet
        )
    else:
        if args.images is None:
            raise DataError("--captions needs --images DIR, the directory of the images")
        paths, captions, owners = karpathy_test(args.captions, args.images)
        model, processor = _load(args)
        figures = evaluate_retrieval(
            model, processor, paths, captions, owners, batch_size=args.batch_size, quiet=args.quiet
        )
    if args.json:
        print(json.dumps({"model": args.model, **figures}))
        return
    for name, value in figures.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
