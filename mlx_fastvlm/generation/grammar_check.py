"""Check that llguidance can compile a grammar, within limits on time and memory.

llguidance does not limit the cost of some grammars, such as an intersection of twenty patterns.
A grammar that may be slow is first compiled in a process that is stopped after a few seconds.
"""

import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MAX_COMPILE_S = 5.0
MAX_COMPILE_BYTES = 2 << 30
LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False)
MAY_BE_SLOW = ('"pattern', '"multipleOf', "start: /")  # the last begins a regular expression
SHORT = 10_000  # characters that compile in a fraction of a second


class ByteVocabulary:
    """The smallest vocabulary for llguidance: a token for each byte, and an end token."""

    eos_token_id, bos_token_id = 256, None
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"end")

    def __call__(self, text: str) -> list[int]:
        """Encode a text."""
        return list(text.encode())


def new_matcher(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar; `error_of` returns the error, if any."""
    return LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)


def error_of(matcher: LLMatcher) -> str:
    """Return the error in one line; empty if there is none."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    lines = [line for line in lines if line and line != "<non-verbose/>"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = errors[0] if errors else " ".join(lines)
    if text == "NoExtensionBias":
        return "no answer can meet it"
    return text.partition(" Enable 'coerce_one_of'")[0]  # use anyOf instead


@lru_cache(maxsize=64)
def find_problem(grammar: str) -> str:
    """Return why a grammar cannot be used, in one line; empty if it can."""
    if len(grammar) <= SHORT and not any(word in grammar for word in MAY_BE_SLOW):
        return _compile(grammar)
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps([grammar, MAX_COMPILE_BYTES]),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=MAX_COMPILE_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return f"it takes more than {MAX_COMPILE_S:.0f} s to compile; simplify it"
    except subprocess.CalledProcessError:
        return f"it takes more than {MAX_COMPILE_BYTES >> 20} MB to compile; simplify it"
    problem: Any = json.loads(done.stdout)
    return str(problem)


def _compile(grammar: str) -> str:
    matcher = new_matcher(LLTokenizer(TokenizerWrapper(ByteVocabulary())), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()  # detects grammars that match nothing
    return error_of(matcher)


if __name__ == "__main__":
    stated_grammar, limit = json.load(sys.stdin)
    with suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    json.dump(_compile(stated_grammar), sys.stdout)
