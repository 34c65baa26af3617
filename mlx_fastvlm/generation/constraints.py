"""Constraints on an answer: a JSON schema, a list of choices, or a regular expression.

They need llguidance, the extra `schema`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mlx_mobileclip.errors import PromptError

from .schema_types import to_json_schema

MAX_CHARACTERS = 100_000
# Compact JSON. The other options are off by default too, but a schema's "x-guidance" could turn
# them on.
JSON_OPTIONS: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint on an answer.

    Attributes:
        name: "schema", "choice" or "regex", as the user calls it.
        grammar: The constraint as a grammar that llguidance has accepted.
    """

    name: str
    grammar: str

    @classmethod
    def of(
        cls,
        schema: object,
        choice: Iterable[str] | None,
        regex: str | None,
        stop: Sequence[str] = (),
    ) -> Self | None:
        """Create one from arguments of `stream_generate`; None if the first three are None.

        Raises:
            PromptError: llguidance is not installed, or the arguments are invalid.
        """
        given = {"schema": schema, "choice": choice, "regex": regex}
        names = [name for name, value in given.items() if value is not None]
        if not names:
            return None
        if len(names) > 1:
            raise PromptError(f"{' and '.join(names)} cannot be combined; give one of them")
        if stop:  # it could end the answer anywhere
            raise PromptError(f"{names[0]} and stop texts cannot be combined; leave out stop")
        try:
            from llguidance import LLMatcher, regex_to_lark

            from .grammar_check import find_problem
        except ImportError as error:
            raise PromptError(
                f"{names[0]} needs the package llguidance; install it with "
                "pip install 'mlx-fastvlm[schema]'"
            ) from error
        if schema is not None:
            text = _checked(_schema_text(schema), "schema")
            try:
                grammar = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
            except ValueError as error:
                raise PromptError(f"schema cannot be used: {error}") from error
        elif choice is not None:
            grammar = LLMatcher.grammar_from_lark(_checked(_choice_rule(choice), "choice"))
        else:
            text = _checked(regex, "regex")
            if (len(text) - len(text.rstrip("\\"))) % 2:  # it would be dropped
                raise PromptError("regex ends in a single backslash; double it to match one")
            rule = regex_to_lark(text, use_ascii="d")  # \d is 0 to 9
            grammar = LLMatcher.grammar_from_lark(f"start: /{rule}/")
        if problem := find_problem(grammar):
            raise PromptError(f"{names[0]} cannot be used: {problem}")
        return cls(names[0], grammar)


def _schema_text(schema: object) -> str:
    try:
        return json.dumps(to_json_schema(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"schema is not JSON ({error})") from error


def _choice_rule(choice: Iterable[str]) -> str:
    """Return the choices as a Lark rule; its strings use the escapes of JSON."""
    choices = list(choice) if isinstance(choice, (list, tuple, set, frozenset)) else []
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise PromptError("choice must be a list of at least one non-empty string")
    texts = [json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in choices]
    return "start: " + " | ".join(texts)


def _checked(text: object, name: str) -> str:
    """Return the text unchanged if llguidance can read it."""
    if not isinstance(text, str):
        raise PromptError(f"{name} must be a string, not a {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise PromptError(f"{name} has more than {MAX_CHARACTERS} characters; shorten it")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError(f"{name} contains a surrogate, which is not a character; remove it")
    return text
