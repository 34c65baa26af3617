"""Hostile tokenizers: each is refused in one line that names the fault."""

import os
from pathlib import Path
from typing import Any

import attacks
import isolated
import pytest
from attacks import Build, Cases, put, split_tables, tokenizer


def vocab(**changes: Any) -> Build:
    return tokenizer(lambda d: d["model"]["vocab"].update(changes))


def merges(*entries: Any) -> Build:
    return tokenizer(lambda d: d["model"]["merges"].extend(entries))


def sparse(case: Path) -> None:
    put(case / "tokenizer.json", b"{")
    os.truncate(case / "tokenizer.json", 65 << 20)


TOKENIZERS: Cases = {
    "missing": (lambda case: (case / "tokenizer.json").unlink(), "neither tokenizer.json nor"),
    "no JSON": (lambda case: put(case / "tokenizer.json", "x"), "not valid JSON"),
    "65 MB": (sparse, "larger than 32 MB"),
    "nested": (lambda case: put(case / "tokenizer.json", "[" * 1000000), "not valid JSON"),
    "no model": (tokenizer(lambda d: {"added_tokens": []}), "not a byte-level BPE tokenizer"),
    "model a list": (tokenizer(lambda d: d | {"model": []}), "not a byte-level BPE tokenizer"),
    "added a number": (tokenizer(lambda d: d | {"added_tokens": 5}), "not a byte-level BPE"),
    "added nested": (
        tokenizer(lambda d: d["added_tokens"].append({"content": [[]], "id": 9})),
        "not a byte-level BPE",
    ),
    "added a null": (
        tokenizer(lambda d: d["added_tokens"].append({"content": None, "id": 299})),
        "a token is not a text",
    ),
    "id negative": (vocab(x=-1), "the id of 'x' is not"),
    "id 2^32": (vocab(x=1 << 32), "the id of 'x' is not"),
    "id huge": (vocab(x=10**30), "the id of 'x' is not"),
    "id true": (vocab(x=True), "the id of 'x' is not"),
    "id fraction": (vocab(x=1.5), "the id of 'x' is not"),
    "id a list": (vocab(x=[1]), "the id of 'x' is not"),
    "id beyond the embedding": (vocab(xyz=384), "belong to different models"),
    "ids shared": (vocab(xyz=7), "two tokens share an id"),
    "id also added": (vocab(xyz=264), "an added token has the id 264 of another token"),
    "bytes missing": (
        tokenizer(lambda d: d["model"]["vocab"].update(a1=d["model"]["vocab"].pop("a"))),
        "has no token for 1 of the 256 bytes",
    ),
    "no control tokens": (
        tokenizer(lambda d: d | {"added_tokens": d["added_tokens"][:2]}),
        "has no <|im_end|>",
    ),
    "no vocabulary": (tokenizer(lambda d: d["model"].update(vocab={})), "token table is empty"),
    "Unigram": (tokenizer(lambda d: d["model"].update(vocab=[[1, 2]])), "a token is not a text"),
    "half a surrogate": (vocab(**{"\ud800": 300}), "unusable tables"),
    "merge of unknowns": (merges("zz qq"), "unusable tables"),
    "merge to an unknown": (merges("q z"), "unusable tables"),
    "merge of three": (merges("a b c"), "not a byte-level BPE tokenizer"),
    "merge of one": (merges("ab"), "not a byte-level BPE tokenizer"),
    "merge a number": (merges(5), "not a byte-level BPE tokenizer"),
    "merge of numbers": (merges([1, 2]), "not a byte-level BPE tokenizer"),
    "merges.txt a pipe": (split_tables(None), "is not a regular file"),
    "merges.txt binary": (split_tables(b"\xff\xfe a"), "cannot be read"),
    "merges.txt of three": (split_tables("a b c"), "cannot be read"),
    "merges by the million": (
        merges(*["a b"] * 500_001),
        "merges, more than 500000; this is not a FastVLM tokenizer",
    ),
    "a token of 5 MB": (vocab(**{"a" * 5_000_000: 300}), "has more than 1024 characters"),
    "an added token of 5 MB": (
        tokenizer(lambda d: d["added_tokens"].append({"content": "a" * 5_000_000, "id": 299})),
        "has more than 1024 characters",
    ),
    "no added tokens": (split_tables("t h", "added.json"), "tokenizer_config.json"),
}


GROUPS = {"tokenizer": TOKENIZERS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, isolated.Outcome]:
    """Outcomes of all cases of GROUPS."""
    sound = attacks.write_sound(tmp_path_factory.mktemp("checkpoints"))
    return attacks.outcomes(sound, attacks.builds(GROUPS))


@pytest.mark.parametrize(("group", "name"), attacks.refused(GROUPS))
def test_hostile_tokenizer_is_refused(
    outcomes: dict[str, isolated.Outcome], group: str, name: str
) -> None:
    isolated.assert_refused(outcomes[f"{group} {name}"], GROUPS[group][name][1])
