"""`evaluate`: measure zero-shot accuracy on ImageNet, or retrieval on COCO or Flickr30k."""

import argparse
import json

from ..errors import DataError
from ..terminal import say
from .loading import embed_labels, load_model
from .options import (
    add_batch_size_argument,
    add_model_arguments,
    add_template_arguments,
    named_path,
    templates,
)

HELP = "measure accuracy on a data set"
EXAMPLES = (
    "mlx-mobileclip evaluate --model demo --imagenet photos --classes-from-folders",
    "mlx-mobileclip evaluate --model demo --imagenet photos --classes-from-folders --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--imagenet",
        type=named_path,
        metavar="DIR",
        help="validation images in one directory per class, named by WordNet id or 0 to 999",
    )
    data.add_argument(
        "--captions",
        type=named_path,
        metavar="JSON",
        help="Karpathy's dataset_coco.json or dataset_flickr30k.json; its test split is used",
    )
    parser.add_argument(
        "--images",
        type=named_path,
        metavar="DIR",
        help="directory of the images that --captions describes",
    )
    parser.add_argument(
        "--classes-from-folders",
        action="store_true",
        help="your own classes: the name of each directory in DIR is a label",
    )
    add_template_arguments(parser)
    add_batch_size_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Evaluate the model and print the results.

    Raises:
        ModelError: an option, the data set, or the model cannot be used.
    """
    if args.captions and (args.template or args.templates):
        raise DataError("--captions does not use --template or --templates; leave them out")
    if args.captions and args.classes_from_folders:
        raise DataError("--captions does not use --classes-from-folders; leave it out")
    if args.imagenet and args.images:
        raise DataError("--imagenet does not use --images; its DIR contains the images")
    if args.captions and args.images is None:
        raise DataError("--captions needs --images DIR, the directory of the images")
    from ..eval.benchmarks import evaluate_imagenet, evaluate_retrieval
    from ..eval.datasets import folder_classes, imagenet_images, karpathy_test
    from ..eval.zero_shot import imagenet_classes

    options = {"batch_size": args.batch_size, "quiet": args.quiet}
    if args.imagenet:
        if args.classes_from_folders:
            paths, targets, labels = folder_classes(args.imagenet)
        else:
            paths, targets = imagenet_images(args.imagenet)
            labels = list(imagenet_classes())
        prompts = templates(args)
        present = len(set(targets))
        if present < len(labels):
            say(f"{present} of {len(labels)} classes have images; all {len(labels)} are candidates")
        model, processor = load_model(args)
        texts = embed_labels(model, processor, labels, prompts, quiet=args.quiet)
        results = evaluate_imagenet(model, processor, paths, targets, texts, **options)
        if present < len(labels) or args.classes_from_folders:
            results = {"classes": present, "labels": len(labels), **results}
    else:
        paths, captions, image_of_text = karpathy_test(args.captions, args.images)
        model, processor = load_model(args)
        results = evaluate_retrieval(model, processor, paths, captions, image_of_text, **options)
    if args.json:
        print(json.dumps({"model": args.model, **results}))
        return
    for name, value in results.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")
