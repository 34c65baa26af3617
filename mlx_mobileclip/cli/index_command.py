"""`index`: keep an index of folders of photos up to date."""

import argparse
import time
from typing import TYPE_CHECKING

from ..defaults import DEFAULT_MODEL
from ..terminal import hide_download_progress, say
from .options import (
    add_batch_size_argument,
    add_index_argument,
    add_model_arguments,
    model_options,
)

if TYPE_CHECKING:
    from ..library.library import Library

HELP = "index folders of photos for search"
EXAMPLES = (
    "mlx-mobileclip index ~/Pictures",
    "mlx-mobileclip index --model demo --index demo.db examples",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="folder or image; by default all indexed folders"
    )
    add_index_argument(parser)
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="GLOB",
        help="exclude files and folders by name or path; may be repeated",
    )
    parser.add_argument(
        "--drop-missing",
        action="store_true",
        help="remove missing photos even if they are more than a fifth of a folder",
    )
    parser.add_argument(
        "--retry", action="store_true", help="retry photos that could not be read before"
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="embed everything again if the model has changed"
    )
    parser.add_argument("--watch", action="store_true", help="keep running and index changes")
    add_batch_size_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Index the folders.

    Raises:
        DataError: the index cannot be written, or was made with another model.
        ModelError: the model cannot be used.
    """
    if args.quiet:
        hide_download_progress()
    from ..library.library import Library

    with Library(args.index) as library:
        _index(library, args)
        if args.watch:
            from ..library.watch import changes

            for _ in changes(library, quiet=args.quiet):
                _index(library, args)


def _index(library: "Library", args: argparse.Namespace) -> None:
    started = time.perf_counter()
    options = model_options(args)
    model = args.model if args.model != DEFAULT_MODEL or any(options.values()) else None
    try:
        summary = library.index(
            args.paths,
            model=model,
            **options,
            exclude=args.exclude or (),
            drop_missing=args.drop_missing,
            retry=args.retry,
            rebuild=args.rebuild,
            batch_size=args.batch_size,
            quiet=args.quiet,
        )
    except KeyboardInterrupt:
        say("finished photos are kept; run the same command again to resume")
        raise
    if not args.quiet:
        seconds = time.perf_counter() - started
        parts = [f"{summary.embedded} embedded", f"{summary.unchanged} unchanged"]
        parts += [f"{summary.reused} moved or copied"] if summary.reused else []
        parts += [f"{summary.dropped} dropped"] if summary.dropped else []
        parts += [f"{len(summary.errors)} could not be read"] if summary.errors else []
        say(f"{library.path}: {', '.join(parts)} ({seconds:.1f} s)")
