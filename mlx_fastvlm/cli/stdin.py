"""What `mlx-fastvlm generate` reads from stdin: a question, an image, or a chat."""

import argparse
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mlx_mobileclip.errors import ImageError, PromptError
from mlx_mobileclip.preprocess.image import read_image
from mlx_mobileclip.terminal import say

from ..defaults import PRESETS

STDIN = "-"
MAX_TEXT_BYTES = 4 << 20  # more than any model reads


def read_inputs(args: argparse.Namespace) -> tuple[str | None, list[Any]]:
    """The question, if there is one, and the images, of which one may come from stdin.

    Raises:
        PromptError: stdin is wanted for two things, or its text is too long or not UTF-8.
        ImageError: nothing, or too much, comes from stdin.
    """
    wanted = [args.prompt == STDIN, *(path == STDIN for path in args.image), args.chat]
    if sum(wanted) > 1:
        raise PromptError(
            "stdin can be one thing only: the question (--prompt -), an image (--image -) or a "
            "chat (--chat)"
        )
    prompt = PRESETS[args.preset] if args.preset else args.prompt
    if args.prompt == STDIN or (prompt is None and not any(wanted) and _is_redirected()):
        prompt = _decode(sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)).strip() or None
        if prompt is None and args.prompt == STDIN:
            raise PromptError("stdin holds no question; give one with --prompt")
    return prompt, [_from_stdin() if path == STDIN else path for path in args.image]


def chat(first: str | None, answer: Callable[[str], None]) -> None:
    """Answer the first question, if there is one, and then each line of stdin.

    A question that cannot be answered is named on stderr, and the chat goes on.

    Raises:
        PromptError: at the end, if there were such questions.
    """
    failed = 0
    for line in _lines(first):
        try:
            if question := _decode(line).strip():
                answer(question)
        except PromptError as error:
            failed += 1
            say(f"error: {error}")
    if failed:
        raise PromptError(f"questions without an answer: {failed}; the reasons are above")


def _lines(first: str | None) -> Iterator[bytes]:
    """The first question and the lines of stdin; of a line that is too long only the beginning."""
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
    """Whether stdin is a pipe or a file; what starts programs may leave any other open for ever."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _decode(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise PromptError(f"a question of more than {MAX_TEXT_BYTES >> 20} MB; shorten it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError("a question is not UTF-8; save or type it as UTF-8") from error


def _from_stdin() -> bytes:
    data = read_image(sys.stdin.buffer)
    if not data:
        raise ImageError("stdin holds no image; write the path of a file in place of -")
    return data
