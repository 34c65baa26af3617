"""Options that several commands share."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..defaults import DEFAULT_MODEL
from ..errors import ConfigError, DataError
from ..json_fields import Fields
from ..paths import user_path

if TYPE_CHECKING:
    from ..models.clip import PreprocessConfig


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model options, --quiet and --debug."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="Hugging Face repository, checkpoint directory or file, or demo, the small model "
        "included in this package (default: %(default)s)",
    )
    parser.add_argument(
        "--variant", metavar="V", help="such as MobileCLIP2-S0, if M does not name it"
    )
    add_description_arguments(parser)
    add_loading_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress and no statistics")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `load` from the options of `add_model_arguments`."""
    names = ("variant", "revision", "dtype", "config", "preprocess")
    return {name: getattr(args, name) for name in names}


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --revision and --dtype."""
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="default: float16 on a GPU, float32 on a CPU",
    )


def add_description_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options that override the configs of a checkpoint."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON config of open_clip, Apple or timm that describes M, instead of M's own",
    )
    parser.add_argument(
        "--preprocess",
        type=preprocess_config,
        metavar="JSON",
        help="image preprocessing, instead of M's own, such as "
        """'{"image_size": 256, "interpolation": "bicubic", "mean": [0,0,0], "std": [1,1,1]}'""",
    )


def preprocess_config(text: str) -> "PreprocessConfig":
    """Parse image preprocessing from a JSON object with every field of PreprocessConfig."""
    from ..models.clip import PreprocessConfig

    names = [field.name for field in fields(PreprocessConfig)]
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != set(names):
            raise ConfigError(f"give a JSON object of {', '.join(names)}")
        return PreprocessConfig.from_json(Fields(values, "preprocess"))
    except RecursionError as error:
        raise argparse.ArgumentTypeError("is nested too deeply") from error
    except (ValueError, ConfigError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of prompt templates."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--template",
        action="append",
        metavar="T",
        help="prompt with {} for the label; may be repeated, and the prompts are averaged "
        '(default: "a photo of a {}."; for ImageNet the 80 of --templates openai)',
    )
    group.add_argument(
        "--templates", choices=("openai", "simple"), help="a published set of templates"
    )


def add_batch_size_argument(parser: argparse.ArgumentParser) -> None:
    """Add --batch-size."""
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="default: %(default)s"
    )


def add_index_argument(parser: argparse.ArgumentParser) -> None:
    """Add --index."""
    parser.add_argument(
        "--index", type=named_path, metavar="FILE", help="index file, instead of the default one"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that lists photos."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("--paths", action="store_true", help="print one path per line")
    group.add_argument(
        "-0", dest="print0", action="store_true", help="print paths that end with NUL, for xargs -0"
    )


def print_paths(paths: Sequence[str], args: argparse.Namespace) -> None:
    """Print the bytes of paths, ended as the options say.

    Raises:
        DataError: with --paths, a name contains a newline.
    """
    end = b"\0" if args.print0 else b"\n"
    for path in paths:
        if "\n" in path and not args.print0:
            raise DataError(f"{path}: has a newline in its name; use -0 instead of --paths")
    output = getattr(sys.stdout, "buffer", None)
    if output is None:  # replaced by something without bytes
        print("".join(path + end.decode() for path in paths), end="")
        return
    sys.stdout.flush()
    output.write(b"".join(os.fsencode(path) + end for path in paths))


def named_path(name: str) -> Path:
    """Parse a path; refuses "", which `Path` takes for the current directory."""
    if not name:
        raise argparse.ArgumentTypeError("the name is empty; write . for the current directory")
    return user_path(name)


def templates(args: argparse.Namespace) -> tuple[str, ...]:
    """Templates that the options select."""
    from ..eval.zero_shot import PLAIN_TEMPLATE, template_set

    if args.template:
        return tuple(args.template)
    own_classes = getattr(args, "classes_from_folders", False)
    if args.templates or (args.imagenet and not own_classes):
        return template_set(args.templates or "openai")
    return PLAIN_TEMPLATE
