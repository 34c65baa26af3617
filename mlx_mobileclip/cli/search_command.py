"""`search`: find photos by texts, images and filters."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from ..paths import user_path
from ..terminal import printable, say
from .options import add_index_argument, add_output_arguments, print_paths

if TYPE_CHECKING:
    from ..library.results import SearchResults

HELP = "search the index by texts, images and filters"
EXAMPLES = (
    'mlx-mobileclip search "a dog on a beach" --since 2024 -k 10',
    'mlx-mobileclip search "a red car" --not "a person" --html cars.html',
)
ERROR_STATUS = 2  # like grep, where 1 means no match
NO_MATCH = 1
USES_MLX = False  # unless a query is not cached in the index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("query", nargs="?", metavar="QUERY", help="what the photos show")
    add_index_argument(parser)
    add = parser.add_argument
    add("--also", action="append", metavar="TEXT", help="must also show this; may be repeated")
    add("--not", action="append", dest="without", metavar="TEXT",
        help="must not show this; may be repeated")  # fmt: skip
    add("--like", action="append", metavar="IMG", help="similar to this image; may be repeated")
    add("--since", metavar="DATE", help="taken on or after 2026, 2026-05 or 2026-05-01")
    add("--until", metavar="DATE", help="taken on or before this date")
    add("--near", type=_place, metavar="LAT,LON,KM", help="taken within KM kilometres of a place")
    add("--camera", metavar="NAME", help="part of the camera's name")
    add("--in", dest="folder", metavar="DIR", help="in this folder")
    add("--kind", action="append", metavar="SUFFIX", help="suffix, such as jpg; may be repeated")
    add("-k", type=int, default=20, metavar="N", help="number of photos (default: %(default)s)")
    add("--sort", choices=("relevance", "date"), default="relevance", help="default: %(default)s")
    add("--dedupe", action="store_true", help="omit near duplicates of a better match")
    add("--all", action="store_true", help="list the nearest photos, relevant or not")
    add_output_arguments(parser)
    add("--html", type=user_path, metavar="FILE", help="write an HTML page with thumbnails instead")
    add("--no-thumbnails", action="store_true", help="no thumbnails in the terminal")
    add("--quiet", action="store_true", help="no notes")
    add("--debug", action="store_true", help="show tracebacks")


def run(args: argparse.Namespace) -> int:
    """Search and print the results.

    Returns:
        The exit status: 0 if photos were found, else 1.

    Raises:
        DataError: the index or an option cannot be used.
    """
    from ..library.library import Library

    with Library(args.index) as library:
        results = library.search(
            args.query,
            like=args.like or (),
            also=args.also or (),
            without=args.without or (),
            since=args.since,
            until=args.until,
            near=args.near,
            camera=args.camera,
            folder=args.folder,
            kinds=args.kind or (),
            k=args.k,
            sort=args.sort,
            dedupe=args.dedupe,
            everything=args.all,
        )
    _print(results, args)
    if not args.quiet:
        hint = "; use --all to list the nearest" if results.nearest is not None else ""
        say(results.summary() + hint)
    return 0 if results else NO_MATCH


def _print(results: "SearchResults", args: argparse.Namespace) -> None:
    if args.html:
        from ..library.html import write_page

        write_page(args.html, results.to_html())
    elif args.json:
        names = ("query", "photos", "total", "calibrated")
        report = {name: getattr(results, name) for name in names}
        print(json.dumps({**report, "results": results.to_list()}))
    elif args.paths or args.print0:
        print_paths(results.paths, args)
    else:
        _print_table(results, thumbnails=not args.no_thumbnails)


def _print_table(results: "SearchResults", *, thumbnails: bool) -> None:
    """Print a line per photo, below its thumbnail if the terminal supports images."""
    protocol = None
    if thumbnails and sys.stdout.isatty():
        from ..library.thumbnails import escape_sequence, terminal_protocol, thumbnail

        protocol = terminal_protocol()
    for match in results:
        if protocol and (jpeg := thumbnail(match.path)):
            print(escape_sequence(jpeg, protocol))
        taken = (match.taken or "").partition("T")[0]
        path = os.path.relpath(match.path)
        path = match.path if path.startswith("..") else path
        print(f"{match.relevance:6.1f}  {taken:10}  {printable(path)}")


def _place(text: str) -> tuple[float, float, float]:
    try:
        latitude, longitude, km = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError("write LAT,LON,KM, such as 52.5,13.4,10") from error
    return latitude, longitude, km
