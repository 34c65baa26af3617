"""Read what `mlx-fastvlm generate` takes from stdin: a question, an image, or a chat."""

import argparse
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlx_mobileclip.errors import ImageError, PromptError
from mlx_mobileclip.preprocess.image import read_image
from mlx_mobileclip.terminal import say

from ..defaults import PRESETS

STDIN = "-"
MAX_TEXT_BYTES = 4 << 20  # more than any model reads


def read_inputs(args: argparse.Namespace) -> tuple[str | None, list[Any]]:
    """Return the question, or None, and the images; one of these may come from stdin.

    Raises:
        PromptError: stdin is requested twice, or its text is too long or not UTF-8.
        ImageError: the image from stdin is empty or too large.
    """
    uses_stdin = check_stdin_uses(args)
    prompt = PRESETS[args.preset] if args.preset else args.prompt
    if args.prompt == STDIN or (prompt is None and not uses_stdin and _is_redirected()):
        prompt = decode(sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)).strip() or None
        if prompt is None and args.prompt == STDIN:
            raise PromptError("stdin contains no question; give one with --prompt")
    return prompt, [_read_stdin_image() if path == STDIN else path for path in args.image]


def check_stdin_uses(args: argparse.Namespace) -> bool:
    """Return whether anything comes from stdin; raises PromptError if it is requested twice."""
    stdin_uses = [args.prompt == STDIN, *(path == STDIN for path in args.image), args.chat]
    if sum(stdin_uses) > 1:
        raise PromptError(
            "stdin can be read only once: for the question (--prompt -), an image (--image -) "
            "or a chat (--chat)"
        )
    return any(stdin_uses)


def chat(lines: Iterable[bytes], answer: Callable[[str], None]) -> None:
    """Answer the question in each line.

    Errors are reported on stderr, and the chat goes on.

    Raises:
        PromptError: at the end, if any question could not be answered.
    """
    failed = 0
    for line in lines:
        try:
            if question := decode(line).strip():
                answer(question)
        except PromptError as error:
            failed += 1
            say(f"error: {error}")
    if failed:
        raise PromptError(f"questions not answered: {failed}; see the errors above")


def read_lines(first: str | None) -> Iterator[bytes]:
    """The first question and the lines of stdin; a line that is too long is cut."""
    if first is not None:
        yield os.fsencode(first)
    while True:
        if sys.stdin.isatty():
            say("> ", end="")
        line = rest = sys.stdin.buffer.readline(MAX_TEXT_BYTES + 1)
        if not line:
            return
        while len(line) > MAX_TEXT_BYTES and rest and not rest.endswith(b"\n"):
            rest = sys.stdin.buffer.readline(MAX_TEXT_BYTES)
        yield line


def _is_redirected() -> bool:
    """Whether stdin is a pipe or a file; anything else may never end."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def decode(data: bytes) -> str:
    """Decode a question; raises PromptError if it is too long or not UTF-8."""
    if len(data) > MAX_TEXT_BYTES:
        raise PromptError(f"the question has more than {MAX_TEXT_BYTES >> 20} MB; shorten it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError("the question is not UTF-8; encode it as UTF-8") from error


def _read_stdin_image() -> bytes:
    data = read_image(sys.stdin.buffer)
    if not data:
        raise ImageError("stdin is empty; give the path of an image in place of -")
    return data
