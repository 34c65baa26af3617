"""Time bounds of CLIP's tokenizer on hostile texts, with and without ftfy."""

import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from mlx_mobileclip.errors import PromptError
from mlx_mobileclip.preprocess import tokenizer
from mlx_mobileclip.preprocess.tokenizer import MAX_MARKS, clip_tokenizer

TEXT_FIXERS: dict[str, Callable[[], Callable[[str], str]]] = {
    "ftfy": tokenizer._text_fixer.__wrapped__,
    "plain": lambda: tokenizer._fix_text,
}
TIBETAN = "\u0f73"  # not a combining mark, but decomposes into two
SLOW = {
    "entities": "&#x301;&#803;" * 5000,
    "wrongly decoded": "a" + "\u0301\u0323".encode().decode("latin-1") * 5000,
    "ampersands": "&" * 10_000,
    "lines": "\n" * 10_000 + "a",
    "letters": "a" * 10_000,
    "joined": "\U0001f468\u200d" * 5000,
    "short runs": ("a" + "\u0301\u0323" * (MAX_MARKS // 2)) * 40,
}


@pytest.fixture(params=TEXT_FIXERS, autouse=True)
def text_fixer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_text_fixer", TEXT_FIXERS[request.param])


@pytest.mark.parametrize("marks", ["\u0301", "\u0323\u0301", TIBETAN, "\u0344", "\u3099\u0301"])
def test_long_runs_of_marks_are_refused(marks: str) -> None:
    started = time.process_time()
    with pytest.raises(PromptError, match="more than 256 combining marks in a row; take some out"):
        clip_tokenizer()(["a" + marks * (1_000_000 // len(marks))])
    assert time.process_time() - started < 0.2


def test_usual_numbers_of_marks_are_accepted() -> None:
    text = "Z" + "\u0301\u0323\u0307" * 20 + "algo"
    with pytest.warns(UserWarning, match="the model reads the first 75"):
        ids = clip_tokenizer()([text])
    assert ids.shape == (1, 77) and ids[0, -1] == clip_tokenizer().end_id


@pytest.mark.filterwarnings("ignore:text ")
@pytest.mark.parametrize("name", SLOW)
def test_slow_texts_take_less_than_half_a_second(name: str) -> None:
    """This holds even at a hundred times the length, most of which is not read."""
    encode = clip_tokenizer()
    started = time.process_time()
    encode([SLOW[name] * 100])
    assert time.process_time() - started < 0.5


def test_entity_of_too_many_digits_is_replaced() -> None:
    """Python refuses to parse so many digits."""
    for text in ("&#" + "9" * 5000 + ";", "&amp;#" + "9" * 5000 + ";"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ids = clip_tokenizer()([f"a {text} b"])
        assert np.array_equal(ids, clip_tokenizer()(["a \ufffd b"]))


def test_only_the_beginning_of_a_long_text_is_read() -> None:
    begin = "a photo of a cat, " * 600
    with pytest.warns(UserWarning, match="has more than [0-9]+ tokens; the model reads the first"):
        ids = clip_tokenizer()([begin * 1000])
    with pytest.warns(UserWarning, match="has [0-9]+ tokens; the model reads the first 75"):
        assert np.array_equal(ids, clip_tokenizer()([begin[:400]]))
