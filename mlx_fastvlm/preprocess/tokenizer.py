"""Qwen2's byte-level BPE tokenizer, built from a checkpoint's vocabulary and merges.

Only these tables and the list of added tokens are read from the files. The splitting pattern is
fixed, so that no pattern of a hostile tokenizer.json is ever run. Text never becomes a control
token, whatever it contains. Added tokens that are not special, such as "<loc_1>", are text.

Source: transformers 5.23 `models/qwen2/tokenization_qwen2.py`.
"""

import codecs
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.json_fields import read_bounded, read_json
from mlx_mobileclip.preprocess.byte_alphabet import byte_alphabet

MAX_TOKENIZER_BYTES = 32 << 20  # Qwen2.5's takes 7
MAX_VOCABULARY = 1_000_000
MAX_MERGES = 500_000  # Qwen2.5 has 151,387
MAX_TOKEN = 1024  # characters
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTROL_TOKENS = (TURN_START, TURN_END, TEXT_END, "<image>")  # regardless of their flags
PROMPT_TOKENS = (TURN_START, TURN_END, "<image>")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
STRIP_FLAGS = ("single_word", "lstrip", "rstrip")  # would change the text around a control token


BYTES = byte_alphabet()


@dataclass(frozen=True, slots=True)
class Added:
    """An added token as tokenizer.json lists it, with the names and the order of its fields."""

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool

    @property
    def is_control(self) -> bool:
        """Whether it is a control token, which text never becomes and which has no text."""
        return self.special or self.content in CONTROL_TOKENS


class Tokenizer:
    """Encodes text as ids and decodes ids to bytes; control tokens are separate, by name.

    Attributes:
        added: Id of each added token, control tokens among them.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], added: list[Added]):
        """Build it from the tables that `read` has checked."""
        self._entries = sorted(added, key=lambda entry: entry.id)
        self.added = {entry.content: entry.id for entry in added}
        control = {entry.content for entry in added if entry.is_control}
        texts = [entry for entry in self._entries if not entry.is_control]
        self._vocab = {token: i for token, i in vocab.items() if token not in control}
        # The backend gives an added token the id that its content has in the vocabulary.
        self._vocab |= {entry.content: entry.id for entry in texts}
        self._backend = _backend(self._vocab, merges)
        flags = {entry.content: {flag: getattr(entry, flag) for flag in FLAGS} for entry in texts}
        self._backend.add_tokens([AddedToken(content, **flags[content]) for content in flags])
        self._bytes: list[bytes | None] = [None] * self.size
        self._tokens = {i: token for token, i in self._vocab.items()}
        # The backend normalises the content of tokens that are matched in normalised text.
        self._tokens |= {e.id: self._backend.id_to_token(e.id) or e.content for e in texts}

    @cached_property
    def size(self) -> int:
        """One more than the largest id in use."""
        return 1 + max(*self._vocab.values(), *self.added.values())

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: end of turn and end of text."""
        return frozenset(self.added[t] for t in (TURN_END, TEXT_END) if t in self.added)

    def encode(self, text: str) -> list[int]:
        """Encode a text literally: "<|im_end|>" in it becomes ordinary tokens."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of a token; empty for control tokens and unknown ids."""
        if not 0 <= token_id < self.size:
            return b""
        data = self._bytes[token_id]
        if data is None:
            token = self._tokens.get(token_id, "")
            in_alphabet = all(c in BYTES for c in token)  # if not, it is literal text
            data = bytes(BYTES[c] for c in token) if in_alphabet else token.encode()
            self._bytes[token_id] = data
        return data

    def decode(self, token_ids: list[int]) -> str:
        """Decode a complete list of ids."""
        decoder = TextDecoder(self)
        return "".join(map(decoder.feed, token_ids)) + decoder.finish()

    def save(self, path: Path) -> None:
        """Write a tokenizer.json with the same ids, which other programs can read."""
        data = json.loads(self._backend.to_str())
        data["model"]["vocab"] |= self.added
        data["added_tokens"] = [asdict(entry) for entry in self._entries]
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


class TextDecoder:
    """Decodes a stream of ids; characters whose bytes span tokens are held until complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return what is left: U+FFFD if the ids end inside a character."""
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
        vocab, merges, entries = _from_tokenizer_json(directory / "tokenizer.json")
    elif (directory / "vocab.json").is_file():
        vocab, merges, entries = _from_vocab_and_merges(directory)
    else:
        raise ConfigError(
            f"{directory}: has neither tokenizer.json nor vocab.json; "
            "copy the tokenizer files of the checkpoint there"
        )
    where = f"{directory}: tokenizer"
    if len(merges) > MAX_MERGES:
        raise ConfigError(
            f"{where}: {len(merges)} merges, more than {MAX_MERGES}; this is not a FastVLM "
            "tokenizer"
        )
    _check_ids(vocab, where)
    _check_ids({token: entry["id"] for token, entry in entries.items()}, where)
    added = [_added_token(entry, where) for entry in entries.values()]
    for token in (TURN_START, TURN_END):
        if token not in entries:
            raise ConfigError(f"{where}: has no {token}; this is not a FastVLM tokenizer")
    text = vocab.keys() - {entry.content for entry in added if entry.is_control}
    if missing := BYTES.keys() - text:
        raise ConfigError(
            f"{where}: has no token for {len(missing)} of the 256 bytes; text would be lost"
        )
    for entry in added:
        strips = [flag for flag in STRIP_FLAGS if getattr(entry, flag)]
        if entry.content in PROMPT_TOKENS and strips:
            raise ConfigError(f"{where}: {strips[0]} of {entry.content} is true; it must be false")
        if vocab.get(entry.content, entry.id) != entry.id:
            raise ConfigError(f"{where}: {entry.content[:40]!r} has another id in the vocabulary")
    texts = [entry for entry in added if not entry.is_control]
    for entry in texts:
        # The backend panics if lstrip and rstrip of two tokens match the same white space.
        if entry.lstrip and entry.content[0].isspace() and any(other.rstrip for other in texts):
            raise ConfigError(
                f"{where}: lstrip of {entry.content[:40]!r}, which begins with white space, is "
                "true; with tokens that have rstrip it must be false"
            )
    overlap = {entry.id for entry in added if entry.content not in vocab} & set(vocab.values())
    if overlap:
        raise ConfigError(f"{where}: an added token has the id {min(overlap)} of another token")
    try:
        return Tokenizer(vocab, merges, added)
    except BaseException as error:  # a panic in Rust is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ConfigError(f"{where}: unusable tables ({str(error)[:200]})") from error


def _check_ids(table: dict[Any, Any], where: str) -> None:
    if len(table) > MAX_VOCABULARY:
        raise ConfigError(f"{where}: more than {MAX_VOCABULARY} tokens")
    if not table:
        raise ConfigError(f"{where}: the token table is empty")
    for token, token_id in table.items():
        if not isinstance(token, str):
            raise ConfigError(f"{where}: a token is not a text")
        if len(token) > MAX_TOKEN:
            raise ConfigError(f"{where}: {token[:40]!r}... has more than {MAX_TOKEN} characters")
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCABULARY:
            raise ConfigError(f"{where}: the id of {token[:40]!r} is not from 0 to 999999")
    if len(set(table.values())) != len(table):
        raise ConfigError(f"{where}: two tokens share an id")


def _added_token(entry: Mapping[str, Any], where: str) -> Added:
    """Check the flags of an entry whose content and id have been checked."""
    content = entry["content"]
    if not content:
        raise ConfigError(f"{where}: an added token is empty")
    special = entry.get("special", True)
    flags = {flag: entry.get(flag, False) for flag in FLAGS}
    flags["normalized"] = entry.get("normalized", not special)  # default of the tokenizers library
    for flag, value in (flags | {"special": special}).items():
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {flag} of {content[:40]!r} is not true or false")
    return Added(entry["id"], content, **flags, special=special)


Entries = dict[str, dict[str, Any]]  # added tokens by content, with "id" and flags
Tables = tuple[dict[str, int], list[tuple[str, str]], Entries]


def _by_content(entries: list[dict[str, Any]]) -> Entries:
    table: Entries = {}
    for entry in entries:
        if table.setdefault(entry["content"], {**entry, "id": entry["id"]}) != entry:
            raise ValueError(f"{entry['content'][:40]!r} is listed twice")
    return table


def _from_tokenizer_json(path: Path) -> Tables:
    data = read_json(path, MAX_TOKENIZER_BYTES)
    try:
        vocab = dict(data["model"]["vocab"])
        merges = [_merge(m) for m in data["model"]["merges"]]
        added = _by_content(data["added_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a byte-level BPE tokenizer ({error!r})") from error
    return vocab, merges, added


def _from_vocab_and_merges(directory: Path) -> Tables:
    vocab = read_json(directory / "vocab.json", MAX_TOKENIZER_BYTES)
    path = directory / "merges.txt"
    try:
        text = read_bounded(path, MAX_TOKENIZER_BYTES).decode("utf-8")
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        merges = [_merge(line) for line in lines if line and not line.startswith("#version")]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return vocab, merges, _read_added_tokens(directory)


def _read_added_tokens(directory: Path) -> Entries:
    """Read added tokens; those without flags in tokenizer_config.json are text by default."""
    path, added_path = directory / "tokenizer_config.json", directory / "added_tokens.json"
    config, ids, names = (
        read_json(file, MAX_TOKENIZER_BYTES) if file.exists() else {}
        for file in (path, added_path, directory / "special_tokens_map.json")
    )
    try:
        decoder = config.get("added_tokens_decoder") or {}
        entries = _by_content([{**token, "id": int(i)} for i, token in decoder.items()])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: unusable added_tokens_decoder ({error!r})") from error
    special = {*CONTROL_TOKENS, *_named_special(config), *_named_special(names)}
    for token, token_id in ids.items():
        is_special = token in special or token.startswith("<|")  # as Qwen writes control tokens
        added = {"content": token, "id": token_id, "special": is_special}
        if entries.setdefault(token, added)["id"] != token_id:
            raise ConfigError(f"{added_path}: {token[:40]!r} has another id in {path.name}")
    if not entries:
        raise ConfigError(f"{path}: lists no added tokens, nor does {added_path}")
    return entries


def _named_special(values: Mapping[str, Any]) -> set[str]:
    """Tokens in fields such as eos_token and additional_special_tokens."""
    named: list[Any] = []
    for key, value in values.items():
        if key.endswith("_token"):
            named.append(value)
        elif key.endswith("special_tokens") and isinstance(value, (dict, list)):
            named += value.values() if isinstance(value, dict) else value
    contents = [item.get("content") if isinstance(item, dict) else item for item in named]
    return {content for content in contents if isinstance(content, str)}


def _merge(entry: Any) -> tuple[str, str]:
    left, right = entry.split(" ") if isinstance(entry, str) else entry
    if not isinstance(left, str) or not isinstance(right, str):
        raise ValueError("a merge is not a pair of strings")
    return left, right
