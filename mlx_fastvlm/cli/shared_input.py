"""Input of a command that mlx.launch runs in several processes: rank 0 reads it for all.

mlx.launch passes on what comes from stdin, but not its end. An empty line stands for the end.
"""

import argparse
from collections.abc import Iterator
from itertools import takewhile

import mlx.core as mx

from mlx_mobileclip.errors import PromptError
from mlx_mobileclip.preprocess.image import read_image
from mlx_mobileclip.terminal import say

from ..defaults import PRESETS
from ..models.sharding import bytes_from_first_rank
from .stdin import MAX_TEXT_BYTES, STDIN, check_stdin_uses, decode, read_lines

Group = mx.distributed.Group


def share_inputs(args: argparse.Namespace, group: Group) -> tuple[str | None, list[bytes]]:
    """Return the question, or None, and the images as rank 0 has them; see `read_inputs`.

    Raises:
        PromptError: an image or two things are to come from stdin, or it has no question.
        ImageError: rank 0 cannot read an image.
    """
    check_stdin_uses(args)
    if STDIN in args.image:
        raise PromptError(
            "mlx.launch does not pass on the end of stdin, so an image cannot come from there; "
            "give --image the path of a file"
        )
    is_first = group.rank() == 0
    prompt = PRESETS[args.preset] if args.preset else args.prompt
    if prompt == STDIN:
        prompt = decode(_share(_read_question() if is_first else None, group)).strip()
        if not prompt:
            raise PromptError("stdin contains no question; give one with --prompt")
    images = [_share(read_image(path) if is_first else None, group) for path in args.image]
    return prompt, images


def share_lines(first: str | None, group: Group) -> Iterator[bytes]:
    """The first question, if it is not empty, and the lines of rank 0's stdin, on every rank."""
    first = first if first and first.strip() else None
    lines = takewhile(bytes.strip, read_lines(first)) if group.rank() == 0 else iter(())
    while (line := bytes_from_first_rank(next(lines, None), group)) is not None:
        yield line


def _read_question() -> bytes:
    """Read lines from stdin up to an empty one; one that is too long ends it as well."""
    say("reading the question from stdin; an empty line ends it")
    question = b""
    for line in takewhile(bytes.strip, read_lines(None)):
        question += line
        if len(question) > MAX_TEXT_BYTES:
            break
    return question


def _share(data: bytes | None, group: Group) -> bytes:
    return bytes_from_first_rank(data, group) or b""
