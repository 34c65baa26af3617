"""Behaviour shared by all command lines: usage errors, exit status, one-line errors, progress.

stdout is reserved for the result. `say` is the only place that writes to stderr: names in files,
and messages of libraries that quote them, may hold what a terminal obeys.
"""

import argparse
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any, NoReturn, TextIO

from .errors import ModelError

INTERRUPTED = 130
BAR_WIDTH = 24
REDRAW_SECONDS = 0.1  # on a terminal
LINE_SECONDS = 10.0  # between plain lines, where stderr is no terminal
CLEAR_LINE = "\r\x1b[K"  # move to the start of the line and clear it
# Control characters, those that separate lines or change the direction of writing, and halves of
# surrogate pairs. Joiners stay, which emoji and Indic scripts need.
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


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
        message = printable(message)  # argparse writes it, not `say`
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
    except KeyboardInterrupt:
        say("\ninterrupted", keep="\n")
        return INTERRUPTED
    except BrokenPipeError:
        _abandon(sys.stdout)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 (each is told, and shown whole with --debug)
        if debug:
            say(traceback.format_exc().rstrip(), keep="\n")
        elif isinstance(error, ModelError):
            say(f"error: {error}")
        else:
            message = " ".join(str(error).split()) or type(error).__name__
            say(f"error: {message} (run again with --debug for the traceback)")
        try:
            sys.stdout.flush()
        except OSError:
            _abandon(sys.stdout)
        return 1
    return 0


def open_standard_streams() -> None:
    """Open /dev/null in place of a standard stream that is closed, as after `<&-` in a shell.

    The next file to be opened would take its descriptor, and be read or written in its place.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r"))  # noqa: PTH123, SIM115


def say(text: str, *, start: str = "", end: str = "\n", keep: str = "") -> None:
    """Print a text on stderr, without what a terminal would obey.

    Where stderr is full or closed, nothing is printed, and the work goes on.

    Args:
        text: Any text.
        start: Printed before it as it is, such as CLEAR_LINE.
        end: Printed after it as it is.
        keep: Control characters of the text that stay.
    """
    try:
        print(f"{start}{printable(text, keep=keep)}", end=end, file=sys.stderr, flush=True)
    except OSError:
        _abandon(sys.stderr)


def _abandon(stream: TextIO) -> None:
    """Redirect a stream, so that the flush at exit does not fail on a closed pipe or a full disk.

    It stays as it is where it has no descriptor.
    """
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(f"warning: {message}", start=CLEAR_LINE if sys.stderr.isatty() else "")


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
        say(f"{what} ...", end="")
    try:
        yield set_status
    except BaseException:
        if live:
            say("")
        raise
    if not quiet:
        start = CLEAR_LINE if live else ""
        say(f"{status} ({time.perf_counter() - started:.1f} s)", start=start)


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
            say("", start=CLEAR_LINE, end="")

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
            say(self._text())

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        say(text, start=CLEAR_LINE if self._live else "")
        if self._live:
            self._draw()

    def _draw(self) -> None:
        filled = BAR_WIDTH * self.done // max(1, self.total)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        say(f"[{bar}] {self._text()}", start=CLEAR_LINE, end="")

    def _text(self) -> str:
        seconds = time.perf_counter() - self._started
        fresh = self.done - self._already
        text = f"{self.done} of {self.total} {self.unit}"
        if fresh and seconds > 0:
            left_s = round(seconds * (self.total - self.done) / fresh)
            text += f", {fresh / seconds:.1f}/s, {left_s // 60}:{left_s % 60:02d} left"
        return text


def printable(text: str, *, keep: str = "") -> str:
    """Remove characters that could move a terminal's cursor, reorder what it shows, or worse.

    Args:
        text: Any text; surrogates, as in file names that are not UTF-8, become backslash escapes.
        keep: Control characters that stay, such as newline and tab.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return UNSAFE.sub(lambda found: found[0] if found[0] in keep else "", text)
