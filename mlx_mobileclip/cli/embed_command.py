"""`embed`: write the embeddings of images or texts to a file."""

import argparse
import time
from collections.abc import Callable
from functools import partial

from ..embedding.lines import read_lines
from ..errors import DataError
from ..paths import user_path
from ..terminal import say
from .inputs import directories_in, find_all_images
from .loading import load_model
from .options import add_batch_size_argument, add_model_arguments

HELP = "write embeddings of images or texts to a file"
EXAMPLES = (
    "mlx-mobileclip embed --model demo --images examples --output images.npz",
    "mlx-mobileclip embed --model demo --images examples --output images.npz --update",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--images",
        nargs="+",
        metavar="SRC",
        help="directory (searched recursively), glob, image, or file with one path per line",
    )
    inputs.add_argument(
        "--texts", type=user_path, metavar="FILE", help="file with one text per line"
    )
    parser.add_argument(
        "--output",
        type=user_path,
        required=True,
        metavar="X",
        help=".safetensors, .npz or .parquet",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="update an existing X: embed new and changed files, drop deleted ones, and keep the "
        "rest, including files outside SRC",
    )
    add_batch_size_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Embed the images or texts and write the file.

    Raises:
        DataError: some inputs were skipped (the others are in the file), or nothing was written.
        ModelError: the model cannot be used.
    """
    from ..embedding.embed_to_file import Summary, embed_images, embed_texts
    from ..embedding.writers import check_names, check_output

    check_output(args.output, update=args.update)
    if args.images:
        items, unreadable = find_all_images(args.images)
    else:
        items, unreadable = read_lines(args.texts), 0
        if not items:
            raise DataError(f"{args.texts}: contains no text; write one per line")
    check_names(args.output, items)
    model, processor = load_model(args)
    started = time.perf_counter()
    embed: Callable[..., Summary] = embed_texts
    if args.images:
        embed = partial(embed_images, directories=directories_in(args.images))
    try:
        summary = embed(
            model,
            processor,
            items,
            args.output,
            name=args.model,
            batch_size=args.batch_size,
            quiet=args.quiet,
            update=args.update,
        )
    except KeyboardInterrupt:
        say("run the same command again to resume")
        raise
    unit = "images" if args.images else "texts"
    result = f"embedded {summary.embedded} of {summary.total} {unit} into {args.output}"
    if args.update:
        result += f" ({summary.kept} kept, {summary.dropped} dropped)"
    if skipped := len(summary.skipped) + unreadable:
        raise DataError(f"{result}; skipped the {skipped} named above")
    if not args.quiet:
        seconds = time.perf_counter() - started
        rate = (summary.embedded - summary.resumed - summary.kept) / seconds
        say(f"{result} ({seconds:.1f} s, {rate:.1f} {unit}/s)")
