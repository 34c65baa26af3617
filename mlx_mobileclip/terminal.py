"""Behaviour shared by all command lines: usage errors, exit status, one-line errors, progress.

stdout is reserved for the result; everything here writes to stderr.
"""

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn, TextIO

from .errors import ModelError

INTERRUPTED = 130
BAR_WIDTH = 24
REDRAW_SECONDS = 0.1  # on a terminal
LINE_SECONDS = 10.0  # between plain lines, where stderr is no terminal


class CommandParser(argparse.ArgumentParser):
    """A parser that suggests the right spelling, and ends its help with examples."""

    def __init__(self, *, examples: Sequence[str] = (), **options: Any):
        """Make a parser.

        Args:
            examples: Command lines to show at the end of the help.
            options: Those of `argparse.ArgumentParser`.
        """
        super().__init__(**options)
        self.examples = examples
        self._given: Sequence[str] = ()

    def format_help(self) -> str:
        """The help, with the examples at its end, each in a line of its own."""
        text = super().format_help()
        if self.examples:
            text += "\nexamples:\n" + "".join(f"  {example}\n" for example in self.examples)
        return text

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, and refuse unknown ones, in a subcommand's parser as well."""
        self._given = sys.argv[1:] if args is None else list(args)
        namespace, unknown = super().parse_known_args(self._given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """End the process with a usage error, and suggest what may have been meant."""
        meant = [
            f"did you mean {right}?"
            for wrong, choices in (*self._wrong_options(), *_wrong_choices(message))
            for right in get_close_matches(wrong, choices, 1)
        ]
        super().error("; ".join([message, *meant]))

    def _wrong_options(self) -> Iterator[tuple[str, list[str]]]:
        known = list(self._option_string_actions)
        for word in self._given:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                yield name, known


def _wrong_choices(message: str) -> Iterator[tuple[str, list[str]]]:
    """The rejected value and the valid choices, from argparse's message."""
    found = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)$", message)
    if found:
        yield found[1], [choice.strip(" '") for choice in found[2].split(",")]


def run_command(command: Callable[[], None], *, debug: bool) -> int:
    """Run a command and report errors in one line.

    Args:
        command: What to run.
        debug: Let errors through, for their traceback.

    Returns:
        The exit status: 0 done, 1 error, 130 interrupted or stdout closed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of libraries
            warnings.filterwarnings("always", module="mlx_mobileclip|mlx_fastvlm|convert")
            warnings.showwarning = _show_warning
            command()
        sys.stdout.flush()
    except ModelError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message} (run again with --debug for the traceback)", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _abandon_stdout()
        return 1
    return 0


def _abandon_stdout() -> None:
    """Redirect stdout, so that the flush at exit does not fail on a closed pipe or a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    start = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{start}warning: {printable(str(message))}", file=sys.stderr)


@contextmanager
def progress(what: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done and, at the end, how long it took.

    Args:
        what: Text to show, such as "loading".
        quiet: Show nothing.

    Yields:
        A function that replaces the text in the final line.
    """
    started, status = time.perf_counter(), what

    def set_status(text: str) -> None:
        nonlocal status
        status = text

    live = sys.stderr.isatty() and not quiet
    if live:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield set_status
    except BaseException:
        if live:
            print(file=sys.stderr)
        raise
    if not quiet:
        start = "\r\x1b[K" if live else ""
        print(f"{start}{status} ({time.perf_counter() - started:.1f} s)", file=sys.stderr)


class Bar:
    """Progress of a long run: a bar with rate and time left, or plain lines without a terminal.

    A context manager, which clears the line at the end.
    """

    def __init__(self, total: int, unit: str, *, quiet: bool = False, done: int = 0):
        """Start counting.

        Args:
            total: Number of items.
            unit: Their name in the plural, such as "images".
            quiet: Show nothing except the lines of `say`.
            done: Items that an earlier run has done; they do not count towards the rate.
        """
        self.total, self.unit, self.quiet = total, unit, quiet
        self.done = self._already = done
        self._live = sys.stderr.isatty() and not quiet
        self._started = self._shown = time.perf_counter()

    def __enter__(self) -> "Bar":
        if self._live and self.total:
            self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        """Count items as done."""
        self.done += count
        now = time.perf_counter()
        if self.quiet or now - self._shown < (REDRAW_SECONDS if self._live else LINE_SECONDS):
            return
        self._shown = now
        if self._live:
            self._draw()
        else:
            print(self._text(), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        print(f"\r\x1b[K{text}" if self._live else text, file=sys.stderr, flush=True)
        if self._live:
            self._draw()

    def _draw(self) -> None:
        filled = BAR_WIDTH * self.done // max(1, self.total)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        print(f"\r\x1b[K[{bar}] {self._text()}", end="", file=sys.stderr, flush=True)

    def _text(self) -> str:
        seconds = time.perf_counter() - self._started
        fresh = self.done - self._already
        text = f"{self.done} of {self.total} {self.unit}"
        if fresh and seconds > 0:
            left_s = round(seconds * (self.total - self.done) / fresh)
            text += f", {fresh / seconds:.1f}/s, {left_s // 60}:{left_s % 60:02d} left"
        return text


def printable(text: str, *, keep: str = "") -> str:
    """Remove control characters, which could move a terminal's cursor or worse.

    Args:
        text: Any text; surrogates, as in file names that are not UTF-8, become backslash escapes.
        keep: Control characters that stay, such as newline and tab.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c for c in text if c in keep or not (ord(c) < 32 or 127 <= ord(c) < 160))
