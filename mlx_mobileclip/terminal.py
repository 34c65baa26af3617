"""Behaviour shared by all command lines: usage errors, exit status, one-line errors, progress.

stdout is reserved for the result. Everything on stderr is printed by `say`, which removes control
characters: names in files, and library messages that quote them, may contain some.
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
LINE_SECONDS = 10.0  # between plain lines, if stderr is not a terminal
CLEAR_LINE = "\r\x1b[K"  # move to the start of the line and clear it
# Control characters, line separators and bidirectional controls. Joiners are kept, as emoji and
# Indic scripts need them.
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class CommandParser(argparse.ArgumentParser):
    """A parser that suggests corrections, and ends its help with examples."""

    def __init__(self, *, examples: Sequence[str] = (), **options: Any):
        """Create a parser.

        Args:
            examples: Command lines to show at the end of the help.
            options: Passed to `argparse.ArgumentParser`.
        """
        super().__init__(**options)
        self.examples = examples
        self._argv: Sequence[str] = ()

    def format_help(self) -> str:
        """The help text, followed by the examples, one per line."""
        text = super().format_help()
        if self.examples:
            text += "\nexamples:\n" + "".join(f"  {example}\n" for example in self.examples)
        return text

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; unknown ones are an error, in subcommands as well."""
        self._argv = sys.argv[1:] if args is None else list(args)
        namespace, unknown = super().parse_known_args(self._argv, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with a usage error that suggests corrections."""
        message = printable(message)  # argparse prints it without `say`
        suggestions = [
            f"did you mean {right}?"
            for wrong, choices in (*self._unknown_options(), *_invalid_choices(message))
            for right in get_close_matches(wrong, choices, 1)
        ]
        super().error("; ".join([message, *suggestions]))

    def _unknown_options(self) -> Iterator[tuple[str, list[str]]]:
        known = list(self._option_string_actions)
        for argument in self._argv:
            name = argument.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                yield name, known


def _invalid_choices(message: str) -> Iterator[tuple[str, list[str]]]:
    """The rejected value and the valid choices, from argparse's message."""
    match = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)$", message)
    if match:
        yield match[1], [choice.strip(" '") for choice in match[2].split(",")]


def run_command(
    command: Callable[[], int | None],
    *,
    debug: bool,
    error_status: int = 1,
    limit_memory: bool = True,
) -> int:
    """Run a command and report errors in one line.

    Args:
        command: Function to run; it may return an exit status.
        debug: Show the traceback of errors.
        error_status: Exit status of an error.
        limit_memory: Limit what MLX keeps, which imports it.

    Returns:
        The exit status: the command's, 0 done, 1 error, 130 interrupted or stdout closed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of libraries
            warnings.filterwarnings("always", module="mlx_mobileclip|mlx_fastvlm|convert")
            warnings.showwarning = _show_warning
            if limit_memory:
                from .gpu.memory import limit_cache  # here, as --help need not wait for MLX

                limit_cache()
            status = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("\ninterrupted", keep="\n")
        return INTERRUPTED
    except BrokenPipeError:
        _redirect_to_null(sys.stdout)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 (reported, with --debug as a traceback)
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
            _redirect_to_null(sys.stdout)
        return error_status
    return status or 0


def open_standard_streams() -> None:
    """Replace closed standard streams, as after `<&-` in a shell, by /dev/null.

    Otherwise the next file opened would get the descriptor, and be used as the standard stream.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r"))  # noqa: PTH123, SIM115


def say(text: str, *, start: str = "", end: str = "\n", keep: str = "") -> None:
    """Print a text on stderr, without control characters.

    If stderr is full or closed, nothing is printed and no error is raised.

    Args:
        text: Any text.
        start: Printed unchanged before the text, such as CLEAR_LINE.
        end: Printed unchanged after the text.
        keep: Control characters of the text to keep.
    """
    try:
        print(f"{start}{printable(text, keep=keep)}", end=end, file=sys.stderr, flush=True)
    except OSError:
        _redirect_to_null(sys.stderr)


def _redirect_to_null(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, so that the flush at exit cannot fail.

    A stream without a descriptor is left unchanged.
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


def hide_download_progress() -> None:
    """Turn off the progress bars of huggingface_hub; call it before that is imported."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@contextmanager
def progress(what: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show a task on stderr and, at the end, the time it took.

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
    """Progress bar with rate and time left; plain lines if stderr is not a terminal.

    A context manager that clears the bar at the end.
    """

    def __init__(self, total: int, unit: str, *, quiet: bool = False, done: int = 0):
        """Start counting.

        Args:
            total: Number of items.
            unit: Plural noun for the items, such as "images".
            quiet: Show nothing except the lines of `say`.
            done: Items that an earlier run has done; not counted in the rate.
        """
        self.total, self.unit, self.quiet = total, unit, quiet
        self.done = self._done_before = done
        self._live = sys.stderr.isatty() and not quiet
        self._started = self._drawn = time.perf_counter()

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
        if self.quiet or now - self._drawn < (REDRAW_SECONDS if self._live else LINE_SECONDS):
            return
        self._drawn = now
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
        done_now = self.done - self._done_before
        text = f"{self.done} of {self.total} {self.unit}"
        if done_now and seconds > 0:
            left_s = round(seconds * (self.total - self.done) / done_now)
            text += f", {done_now / seconds:.1f}/s, {left_s // 60}:{left_s % 60:02d} left"
        return text


def printable(text: str, *, keep: str = "") -> str:
    """Remove the characters that a terminal would interpret instead of showing.

    Args:
        text: Any text; surrogates, as in file names that are not UTF-8, become backslash escapes.
        keep: Control characters to keep, such as newline and tab.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return UNSAFE.sub(lambda match: match[0] if match[0] in keep else "", text)
