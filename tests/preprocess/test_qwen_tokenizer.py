"""Added tokens of fine-tunes, against the tokenizers package; control tokens excepted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Theirs

from mlx_fastvlm import ConfigError
from mlx_fastvlm.preprocess import tokenizer
from mlx_fastvlm.preprocess.tokenizer import TextDecoder, Tokenizer

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
ADDED: dict[str, tuple[str, ...]] = {  # with the flags that are set
    "<loc_1>": (),
    "<loc_11>": ("normalized",),
    " <box> ": (),
    "<left>": ("lstrip",),
    "<right>": ("rstrip", "normalized"),
    "<both>": ("lstrip", "rstrip"),
    "word": ("single_word",),
    "the": ("normalized",),  # also made by merges
    "日本": (),
    "e\u0301": (),  # does not occur in normalised text
    "ü": ("normalized",),  # also the character of a byte
    "<u\u0308>": ("normalized",),  # contains one once normalised
    "<secret>": ("special",),
    "<hidden>": ("special", "lstrip"),
}
OUTSIDE = ("日", "日a", "a b")  # in the vocabulary, with characters that represent no byte


def write(directory: Path, added: dict[str, tuple[str, ...]] = ADDED, **changes: Any) -> Path:
    """Write a tokenizer.json that the tokenizers package can read."""
    synthetic.write_tokenizer(directory)
    path = directory / "tokenizer.json"
    tokenizer.read(directory).save(path)
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab |= {token: len(vocab) + i for i, token in enumerate(OUTSIDE)}
    following = len(vocab)
    for content, flags in added.items():
        if content not in vocab:
            following += 1
        entry = {"id": vocab.get(content, following - 1), "content": content}
        data["added_tokens"].append(entry | {flag: flag in flags for flag in FLAGS})
    data["added_tokens"].sort(key=lambda entry: entry["id"])
    path.write_text(json.dumps(data | changes))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Theirs]:
    path = write(tmp_path_factory.mktemp("added"))
    return tokenizer.read(path.parent), Theirs.from_file(str(path))


def control_ids(ours: Tokenizer) -> set[int]:
    special = [token for token, flags in ADDED.items() if "special" in flags]
    return {ours.added[token] for token in (*special, *synthetic.CONTROL_TOKENS)}


def test_added_tokens_are_encoded_and_decoded(pair: tuple[Tokenizer, Theirs]) -> None:
    ours, theirs = pair
    ids = ours.encode("see <loc_1><loc_11>.")
    assert {ours.added["<loc_1>"], ours.added["<loc_11>"]} < set(ids)
    assert ours.decode(ids) == "see <loc_1><loc_11>."
    assert ours.decode([ours.added["<secret>"], ours.added["<|im_end|>"]]) == ""
    assert ours.decode([theirs.token_to_id("日a"), theirs.token_to_id("a b")]) == "日aa b"


PIECES = [*(t for t, flags in ADDED.items() if "special" not in flags), *OUTSIDE]
PIECES += [
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "é",
    "u\u0308",
    "\u0301",
    "<",
    "loc_1",
    "1>",
    ".",
    "words",
    "日",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=9).map("".join))
def test_ids_equal_tokenizers(pair: tuple[Tokenizer, Theirs], text: str) -> None:
    ours, theirs = pair
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == expected, text
    assert ours.decode(expected) == theirs.decode(expected)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=12))
def test_decoded_text_equals_tokenizers(pair: tuple[Tokenizer, Theirs], ids: list[int]) -> None:
    ours, theirs = pair
    assert ours.decode(ids) == theirs.decode(ids)
    decoder = TextDecoder(ours)
    assert "".join([*map(decoder.feed, ids), decoder.finish()]) == theirs.decode(ids)


CONTROL = [t for t, flags in ADDED.items() if "special" in flags] + [*synthetic.CONTROL_TOKENS]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*CONTROL, *PIECES]), max_size=9).map("".join))
def test_typed_control_tokens_stay_text(pair: tuple[Tokenizer, Theirs], text: str) -> None:
    ours, _ = pair
    assert not set(ours.encode(text)) & control_ids(ours)


@pytest.mark.parametrize("token", [*synthetic.CONTROL_TOKENS, "<image>"])
def test_control_tokens_are_special_whatever_the_file_says(token: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"<image>": ()})
    data = json.loads(path.read_text())
    data["added_tokens"] = [entry | {"special": False} for entry in data["added_tokens"]]
    path.write_text(json.dumps(data))
    ours = tokenizer.read(tmp_path)
    assert ours.added[token] not in ours.encode(f"a{token}b")
    assert ours.decode(ours.encode(f"a{token}b")) == f"a{token}b"
    assert ours.decode([ours.added[token]]) == ""


def test_flags_survive_saving(pair: tuple[Tokenizer, Theirs], tmp_path: Path) -> None:
    ours, theirs = pair
    ours.save(tmp_path / "tokenizer.json")
    again, saved = tokenizer.read(tmp_path), Theirs.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.get_added_tokens_decoder() == theirs.get_added_tokens_decoder()
    for i, entry in theirs.get_added_tokens_decoder().items():
        saved_entry = saved.get_added_tokens_decoder()[i]
        assert [getattr(saved_entry, flag) for flag in FLAGS] == [
            getattr(entry, flag) for flag in FLAGS
        ]
    for text in ("see <loc_1> <both> the word words", "u\u0308 e\u0301 日本 日"):
        assert again.encode(text) == ours.encode(text) == saved.encode(text).ids
    assert again.added == ours.added and again.size == ours.size


@pytest.mark.parametrize("both", [False, True])
def test_flags_are_read_from_older_files(both: bool, tmp_path: Path) -> None:
    """vocab.json and merges.txt, with the flags in tokenizer_config.json."""
    synthetic.write_tokenizer(tmp_path, split=True)
    _, _, added = synthetic.tokenizer_tables()
    first = max(added.values()) + 1
    flags = dict.fromkeys(FLAGS, False)
    table = {i: flags | {"content": t, "special": True} for t, i in added.items()}
    table |= {first: flags | {"content": "<loc_1>"}, first + 1: flags | {"content": "<loc_2>"}}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": table}))
    path = tmp_path / "added_tokens.json"
    path.write_text(json.dumps(added | {"<loc_1>": first, "<only_here>": first + 2}))
    if not both:
        path.unlink()
    ours = tokenizer.read(tmp_path)
    assert ours.encode("<loc_1><loc_2>") == [first, first + 1]
    assert ours.decode([first, added["<|im_end|>"], first + 1]) == "<loc_1><loc_2>"
    assert ("<only_here>" in ours.added) is both
    path.write_text(json.dumps(added | {"<loc_1>": first + 1, "<loc_2>": first}))
    with pytest.raises(ConfigError, match=r"<loc_1>.*another id"):
        tokenizer.read(tmp_path)


def test_named_tokens_without_flags_are_special(tmp_path: Path) -> None:
    """This is as in transformers, but Qwen's control tokens are special even if not named."""
    synthetic.write_tokenizer(tmp_path, split=True)
    _, _, added = synthetic.tokenizer_tables()
    names = ("<loc_1>", "<|vision_start|>", "<named>", "<mapped>", "<extra>", "<image>")
    ids = {name: max(added.values()) + 1 + i for i, name in enumerate(names)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added | ids))
    config = {"additional_special_tokens": [{"content": "<named>"}], "unk_token": None}
    config["extra_special_tokens"] = {"x_token": "<extra>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<mapped>"}))
    ours = tokenizer.read(tmp_path)
    assert ours.encode("".join(names)).count(ids["<loc_1>"]) == 1
    assert not set(ours.encode("".join(names))) & {ids[name] for name in names[1:]}
    assert ours.decode(list(ids.values())) == "<loc_1>"


def changed(name: str, **changes: Any) -> Any:
    def change(data: dict[str, Any]) -> None:
        entry = next(e for e in data["added_tokens"] if e["content"] == name)
        entry |= changes

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("<loc_1>", special="no"), "special of '<loc_1>' is not true or false"),
        (changed("<loc_1>", lstrip=1), "lstrip of '<loc_1>' is not true or false"),
        (changed("<loc_1>", content="<box>", special=None), "special of '<box>' is not"),
        (changed("<loc_1>", content=""), "an added token is empty"),
        (changed("<loc_1>", content="<loc_11>"), "'<loc_11>' is listed twice"),
        (changed("ü", id=310), "'ü' has another id in the vocabulary"),
        (changed("ü", special=True), "no token for 1 of the 256 bytes"),
        (changed("the", special=True), "unusable tables"),
        (changed(" <box> ", lstrip=True), "lstrip of ' <box> ', which begins with white space"),
        (changed("<|im_end|>", rstrip=True), "rstrip of <|im_end|> is true"),
        (changed("<|im_start|>", single_word=True), "single_word of <|im_start|> is true"),
    ],
)
def test_inconsistent_added_tokens_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=re.escape(message)):
        tokenizer.read(tmp_path)
