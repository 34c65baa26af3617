"""Texts that ask CLIP's tokenizer for much time: bounded, whether or not ftfy is installed."""

import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from mlx_mobileclip.errors import PromptError
from mlx_mobileclip.preprocess import tokenizer
from mlx_mobileclip.preprocess.tokenizer import MAX_MARKS, clip_tokenizer

MENDERS: dict[str, Callable[[], Callable[[str], str]]] = {
    "ftfy": tokenizer._mender.__wrapped__,
    "plain": lambda: tokenizer._mend,
}
TIBETAN = "\u0f73"  # no mark itself, but two once it is decomposed
SLOW = {
    "entities": "&#x301;&#803;" * 5000,
    "wrongly decoded": "a" + "\u0301\u0323".encode().decode("latin-1") * 5000,
    "ampersands": "&" * 10_000,
    "lines": "\n" * 10_000 + "a",
    "letters": "a" * 10_000,
    "joined": "\U0001f468\u200d" * 5000,
    "short runs": ("a" + "\u0301\u0323" * (MAX_MARKS // 2)) * 40,
}


@pytest.fixture(params=MENDERS, autouse=True)
def mender(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_mender", MENDERS[request.param])


@pytest.mark.parametrize("marks", ["\u0301", "\u0323\u0301", TIBETAN, "\u0344", "\u3099\u0301"])
def test_long_runs_of_marks_are_refused(marks: str) -> None:
    started = time.process_time()
    with pytest.raises(PromptError, match="more than 256 combining marks in a row; take some out"):
        clip_tokenizer()(["a" + marks * (1_000_000 // len(marks))])
    assert time.process_time() - started < 0.2


def test_as_many_marks_as_people_use_are_read() -> None:
    text = "Z" + "\u0301\u0323\u0307" * 20 + "algo"
    with pytest.warns(UserWarning, match="the model reads the first 75"):
        ids = clip_tokenizer()([text])
    assert ids.shape == (1, 77) and ids[0, -1] == clip_tokenizer().end_id


@pytest.mark.filterwarnings("ignore:text ")
@pytest.mark.parametrize("name", SLOW)
def test_a_text_takes_no_more_than_half_a_second(name: str) -> None:
    """A hundred times its length of it, for that is not read."""
    tokens = clip_tokenizer()
    started = time.process_time()
    tokens([SLOW[name] * 100])
    assert time.process_time() - started < 0.5


def test_a_million_digits_stand_for_no_character() -> None:
    """Python refuses to read so large a number."""
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
