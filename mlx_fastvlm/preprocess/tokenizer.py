"""Qwen2's byte-level BPE tokenizer, built from a checkpoint's vocabulary and merges.

Only these two tables and the list of added tokens are taken from the files; the splitting
pattern is fixed here, so that no pattern of a hostile tokenizer.json is ever run. Text and
control tokens are kept apart: text is encoded without them, whatever it spells.

Source: transformers 5.23 `models/qwen2/tokenization_qwen2.py`.
"""

import codecs
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.json_fields import read_bounded, read_json
from mlx_mobileclip.preprocess.byte_alphabet import byte_alphabet

MAX_TOKENIZER_BYTES = 32 << 20  # Qwen2.5's takes 7
MAX_VOCABULARY = 1_000_000
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


BYTES = byte_alphabet()


class Tokenizer:
    """Text to ids and ids to bytes; control tokens by name only."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], added: dict[str, int]):
        """Build from tables that `read` has checked."""
        self._vocab = vocab
        self.added = added
        self._backend = _backend(vocab, merges)
        self._bytes: list[bytes | None] = [None] * self.size
        self._tokens = {i: token for token, i in vocab.items()}

    @cached_property
    def size(self) -> int:
        """One more than the largest id that stands for something."""
        return 1 + max(*self._vocab.values(), *self.added.values())

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: end of turn and end of text."""
        return frozenset(self.added[t] for t in (TURN_END, TEXT_END) if t in self.added)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, taken literally: "<|im_end|>" in it becomes ordinary tokens."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes a token stands for; control tokens and unknown ids stand for none."""
        if not 0 <= token_id < self.size:
            return b""
        known = self._bytes[token_id]
        if known is None:
            token = self._tokens.get(token_id, "")
            known = self._bytes[token_id] = bytes(BYTES[c] for c in token if c in BYTES)
        return known

    def decode(self, token_ids: list[int]) -> str:
        """Text of a whole list of ids."""
        decoder = TextDecoder(self)
        return "".join(map(decoder.feed, token_ids)) + decoder.finish()

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that other programs read as well, every id in its place."""
        data = json.loads(self._backend.to_str())
        data["model"]["vocab"] |= self.added
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        data["added_tokens"] = [
            {"id": token_id, "content": token, **flags, "special": True}
            for token, token_id in sorted(self.added.items(), key=lambda item: item[1])
        ]
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


class TextDecoder:
    """Ids to text as they come; characters whose bytes span tokens are held until complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD if the ids stopped inside a character."""
        return self._utf8.decode(b"", final=True)


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Backend:
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def read(directory: Path) -> Tokenizer:
    """Read tokenizer.json, or vocab.json with merges.txt and added_tokens.json.

    Raises:
        ConfigError: the files are missing, malformed, or lack FastVLM's control tokens.
    """
    if (directory / "tokenizer.json").is_file():
        vocab, merges, added = _from_tokenizer_json(directory / "tokenizer.json")
    elif (directory / "vocab.json").is_file():
        vocab, merges, added = _from_vocab_and_merges(directory)
    else:
        raise ConfigError(
            f"{directory}: holds neither tokenizer.json nor vocab.json; "
            "copy the tokenizer files of the checkpoint there"
        )
    where = f"{directory}: tokenizer"
    _check_ids(vocab, where)
    _check_ids(added, where)
    for token in (TURN_START, TURN_END):
        if token not in added:
            raise ConfigError(f"{where}: has no {token}; this is not a FastVLM tokenizer")
    if missing := BYTES.keys() - vocab.keys():
        raise ConfigError(
            f"{where}: has no token for {len(missing)} of the 256 bytes; text would get lost"
        )
    overlap = set(added.values()) & set(vocab.values()) - {vocab.get(t) for t in added}
    if overlap:
        raise ConfigError(f"{where}: id {min(overlap)} is both an added token and another one")
    try:
        return Tokenizer({t: i for t, i in vocab.items() if t not in added}, merges, added)
    except BaseException as error:  # the Rust side panics past Exception on odd tables
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ConfigError(f"{where}: unusable tables ({str(error)[:200]})") from error


def _check_ids(table: dict[Any, Any], where: str) -> None:
    if len(table) > MAX_VOCABULARY:
        raise ConfigError(f"{where}: more than {MAX_VOCABULARY} tokens")
    if not table:
        raise ConfigError(f"{where}: an empty table of tokens")
    for token, token_id in table.items():
        if not isinstance(token, str):
            raise ConfigError(f"{where}: a token is not a text")
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCABULARY:
            raise ConfigError(f"{where}: the id of {token[:40]!r} is not from 0 to a million")
    if len(set(table.values())) != len(table):
        raise ConfigError(f"{where}: two tokens share an id")


def _from_tokenizer_json(
    path: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    data = read_json(path, MAX_TOKENIZER_BYTES)
    try:
        vocab = dict(data["model"]["vocab"])
        merges = [_merge(m) for m in data["model"]["merges"]]
        added = {t["content"]: t["id"] for t in data["added_tokens"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a byte-level BPE tokenizer ({error!r})") from error
    return vocab, merges, added


def _from_vocab_and_merges(
    directory: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    vocab = read_json(directory / "vocab.json", MAX_TOKENIZER_BYTES)
    path = directory / "merges.txt"
    try:
        text = read_bounded(path, MAX_TOKENIZER_BYTES).decode("utf-8")
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        merges = [_merge(line) for line in lines if line and not line.startswith("#version")]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    added_path = directory / "added_tokens.json"
    if added_path.is_file():
        return vocab, merges, read_json(added_path)
    config_path = directory / "tokenizer_config.json"
    table = read_json(config_path).get("added_tokens_decoder")
    try:
        assert isinstance(table, dict)
        return vocab, merges, {t["content"]: int(i) for i, t in table.items()}
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{config_path}: lists no added tokens, nor does {added_path}") from error


def _merge(entry: Any) -> tuple[str, str]:
    left, right = entry.split(" ") if isinstance(entry, str) else entry
    if not isinstance(left, str) or not isinstance(right, str):
        raise ValueError("a merge is not a pair of strings")
    return left, right
