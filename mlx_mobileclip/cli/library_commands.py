"""`dupes`, `export`, `status`, `verify` and `relocate`: index maintenance."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

from ..errors import DataError
from ..paths import user_path
from ..terminal import printable, say
from .options import add_index_argument, add_output_arguments, named_path, print_paths


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_index_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_dupes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level",
        choices=("exact", "near", "similar"),
        default="near",
        help="identical files, near duplicates, or similar photos (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.95,
        metavar="F",
        help="minimum cosine similarity for similar (default: %(default)s)",
    )
    add_output_arguments(parser)
    _add_common(parser)


def _dupes(args: argparse.Namespace) -> None:
    from ..library.library import Library

    with Library(args.index) as library:
        groups = library.duplicates(args.level, threshold=args.threshold, quiet=args.quiet)
    if args.json:
        print(json.dumps(groups))
    elif args.paths or args.print0:
        print_paths([path for group in groups for path in group[1:]], args)
    else:
        print("\n\n".join("\n".join(map(printable, group)) for group in groups), end="")
        print("\n" if groups else "", end="")
    if not args.quiet:
        duplicates = sum(len(group) - 1 for group in groups)
        say(f"{len(groups)} groups, {duplicates} duplicates besides the first of each")


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=named_path, required=True, metavar="X", help=".parquet file to write"
    )
    _add_common(parser)


def _export(args: argparse.Namespace) -> None:
    from ..library.library import Library

    with Library(args.index) as library:
        count = library.export(args.output)
    if not args.quiet:
        say(f"{count} photos written to {args.output}")


def _add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_common(parser)


def _status(args: argparse.Namespace) -> None:
    from ..library.library import Library

    with Library(args.index) as library:
        report = library.status()
    if args.json:
        print(json.dumps(report))
        return
    for name in ("index", "bytes", "model", "photos", "first_taken", "last_taken", "errors"):
        print(printable(f"{name}: {report[name]}"))
    for folder in report["folders"]:
        print(printable(f"folder: {folder['path']} ({folder['files']} files)"))
    for failed in report["failed"]:
        print(printable(f"error: {failed['path']}: {failed['reason']}"))


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", action="store_true", help="also check that photos are unchanged")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    _add_common(parser)


def _verify(args: argparse.Namespace) -> None:
    from ..library.library import Library

    with Library(args.index) as library:
        problems = library.verify(files=args.files)
    if args.json:
        print(json.dumps([asdict(problem) for problem in problems]))
    else:
        for problem in problems:
            print(printable(f"{problem.where}: {problem.what}"))
    if problems:
        raise DataError(f"{args.index or 'the index'}: {len(problems)} problems, listed on stdout")
    if not args.quiet:
        say("no problem found")


def _add_relocate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=user_path, metavar="OLD", help="former path of the folder")
    parser.add_argument("new", type=user_path, metavar="NEW", help="its new path")
    _add_common(parser)


def _relocate(args: argparse.Namespace) -> None:
    from ..library.library import Library

    with Library(args.index) as library:
        count = library.relocate(args.old, args.new)
    if not args.quiet:
        say(f"{count} photos are now in {args.new}")


def _command(
    help_text: str,
    example: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], None],
) -> SimpleNamespace:
    return SimpleNamespace(
        HELP=help_text,
        EXAMPLES=(example,),
        USES_MLX=False,
        add_arguments=add_arguments,
        run=run,
    )


LIBRARY_COMMANDS = {
    "dupes": _command(
        "list duplicate photos",
        "mlx-mobileclip dupes --level exact",
        _add_dupes_arguments,
        _dupes,
    ),
    "export": _command(
        "export the index as Parquet",
        "mlx-mobileclip export --output photos.parquet",
        _add_export_arguments,
        _export,
    ),
    "status": _command(
        "show the contents of the index", "mlx-mobileclip status", _add_status_arguments, _status
    ),
    "verify": _command(
        "check the index", "mlx-mobileclip verify --files", _add_verify_arguments, _verify
    ),
    "relocate": _command(
        "update the path of a folder that has moved",
        "mlx-mobileclip relocate /Volumes/Old/Photos /Volumes/New/Photos",
        _add_relocate_arguments,
        _relocate,
    ),
}
