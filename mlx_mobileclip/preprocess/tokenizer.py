"""CLIP's byte-pair tokenizer: text to a fixed number of ids, 77 in CLIP, padded with 0.

Text is cleaned and split into words, digits and punctuation; the bytes of each are merged by a
fixed list of merges. The last token of a word ends in "</w>". Special tokens are never parsed from
text: "<end_of_text>" in a text would move the position that the text tower pools.

Source: open_clip 3.3.0 `tokenizer.py` (SimpleTokenizer), the same as in apple/ml-mobileclip
4144bb1 `mobileclip/modules/text/tokenizer.py`. The merges are OpenAI's, see data/LICENSE-CLIP;
a checkpoint with its own vocabulary has its merges in merges.txt.
"""

import gzip
import hashlib
import html
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import __version__ as tokenizers_version

from ..errors import ConfigError, PromptError
from ..json_fields import read_bounded
from .byte_alphabet import byte_alphabet

CONTEXT_LENGTH = 77
DATA_PACKAGE = "mlx_mobileclip"
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # lines of the file that are used; the others have no ids
BASE = 2 * 256 + 2  # ids without merges: each byte within and at the end of a word, start, end
CLIP_VOCABULARY = BASE + MERGES
OWN_MERGES_FILE = "merges.txt"
MAX_MERGES_BYTES = 4 << 20  # CLIP's have half a megabyte
WORD_END = "</w>"
# U+0345 is dropped, as by the reference, whose case-insensitive pattern does not match it.
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
MAX_TEXT = 10_000  # characters that are read; far more than 77 ids can cover
MAX_MARKS = 256  # consecutive combining marks; NFC takes quadratic time
SHOWN = 40  # characters of a text in an error

Merges = list[tuple[str, str]]

# Replacements that ftfy makes in any text, for when it is not installed.
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u02bc"), "'")
_QUOTES |= dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')
_LIGATURES = {
    c: unicodedata.normalize("NFKD", chr(c))
    for c in (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07))
}
_LIGATURES |= {0x149: "'n", 0xFB05: "\u017ft"}
_WIDTHS = {
    c: unicodedata.normalize("NFKC", chr(c))
    for c in (0x3000, *range(0xFF01, 0xFFF0))
    if unicodedata.normalize("NFKC", chr(c)) != chr(c)
}
_CONTROLS = dict.fromkeys((*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, 0xFEFF), "")
_REPLACEMENTS = _QUOTES | _LIGATURES | _WIDTHS | _CONTROLS
_HUGE_NUMBER = re.compile("&#[0-9]{1000,};?")  # int() refuses more than 4300 digits


class Tokenizer:
    """CLIP's byte-pair encoding with any list of merges."""

    def __init__(self, merges: Sequence[tuple[str, str]], context_length: int = CONTEXT_LENGTH):
        """Create a tokenizer.

        Args:
            merges: Pairs of tokens in order of priority, with bytes as in `byte_alphabet`.
            context_length: Number of ids per text.
        """
        tokens = _byte_tokens()
        tokens += [left + right for left, right in merges]
        vocab = {token: i for i, token in enumerate(tokens)}
        model = models.BPE(vocab=vocab, merges=list(merges), end_of_word_suffix=WORD_END)
        self._backend = Backend(model)
        by_words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._backend.pre_tokenizer = pre_tokenizers.Sequence([by_words, by_bytes])
        self.start_id, self.end_id = len(tokens), len(tokens) + 1
        self.context_length = context_length

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the ids of a text: 64 hexadecimal digits."""
        versions = (*cleaning_versions(), tokenizers_version)
        content = (self._backend.to_str(), self.context_length, *versions)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def may_be_truncated(self, text: str) -> bool:
        """Whether a text may be too long; False only if it certainly is not.

        Cleaning does not lengthen ASCII text without entities, and an id covers at least a byte.
        """
        return len(text) > self.context_length - 2 or not text.isascii() or "&" in text

    def encode(self, text: str) -> list[int]:
        """Tokenize a text, without start, end and padding."""
        return list(self._backend.encode(clean(text), add_special_tokens=False).ids)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Tokenize texts for the text tower.

        Args:
            texts: At least one text.

        Returns:
            (B, L), L the context length: start, text, end, zeros. A text that is too long is
            truncated before the end token, with a warning.

        Raises:
            PromptError: not a list of texts, or more than 256 consecutive combining marks.
        """
        is_list = isinstance(texts, Sequence) or getattr(texts, "ndim", 0) == 1  # NumPy, pandas
        if isinstance(texts, (str, bytes)) or not is_list or not len(texts):
            raise PromptError('texts takes a list of at least one text, such as ["a cat"]')
        rows = np.zeros((len(texts), self.context_length), np.int32)
        room = self.context_length - 2
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                raise PromptError(f"a text cannot be a {type(text).__name__}")
            begin = text[:MAX_TEXT]
            _check_marks(begin)
            ids = self.encode(begin)
            if len(ids) > room:
                more = "more than " if begin != text else ""
                warnings.warn(
                    f"text {text[:SHOWN]!r}... has {more}{len(ids)} tokens; the model reads the "
                    f"first {room}",
                    stacklevel=3,
                )
            ids = [self.start_id, *ids[:room], self.end_id]
            row[: len(ids)] = ids
        return rows


@cache
def clip_tokenizer(context_length: int = CONTEXT_LENGTH) -> Tokenizer:
    """The tokenizer of every published model, with 49408 ids."""
    data = resources.files(DATA_PACKAGE).joinpath("data", MERGES_FILE).read_bytes()
    lines = gzip.decompress(data).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [line.split() for line in lines]
    return Tokenizer([(left, right) for left, right in merges], context_length)


def read_merges(directory: Path, vocab_size: int) -> Merges | None:
    """Read the merges of a checkpoint from merges.txt; None if its vocabulary is CLIP's.

    Each line has the two tokens of a merge, separated by a space, in order of priority.

    Raises:
        ConfigError: the file is missing, malformed, or does not match the vocabulary size.
    """
    if vocab_size == CLIP_VOCABULARY:
        return None
    path = directory / OWN_MERGES_FILE
    try:
        lines = read_bounded(path, MAX_MERGES_BYTES).decode("utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: is missing; a vocabulary of {vocab_size}, unlike CLIP's {CLIP_VOCABULARY}, "
            "requires it; copy it from the source of the checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); download it again") from error
    known, merges = set(_byte_tokens()), Merges()
    for number, line in enumerate(lines, 1):
        left, space, right = line.partition(" ")
        if not space or left not in known or right not in known:
            raise ConfigError(
                f"{path}: line {number}, {line[:SHOWN]!r}, is not two known tokens separated by a "
                "space; the checkpoint cannot be used"
            )
        if left + right in known:
            raise ConfigError(
                f"{path}: line {number} repeats the token {(left + right)[:SHOWN]!r}; "
                "the checkpoint cannot be used"
            )
        known.add(left + right)
        merges.append((left, right))
    if vocab_size != BASE + len(merges):
        raise ConfigError(
            f"{path}: {len(merges)} merges make a vocabulary of {BASE + len(merges)}, not of "
            f"{vocab_size} as config.json says; the files belong to different models"
        )
    return merges


def _check_marks(text: str) -> None:
    if len(text) <= MAX_MARKS or text.isascii():
        return
    marks = "".join(map(re.escape, filter(_is_mark, set(text))))
    if marks and re.search(f"[{marks}]{{{MAX_MARKS + 1}}}", text):
        raise PromptError(
            f"a text has more than {MAX_MARKS} combining marks in a row; take some out"
        )


def _is_mark(character: str) -> bool:
    """Whether NFC reorders the character; some are reordered only after decomposition."""
    return unicodedata.combining(unicodedata.normalize("NFD", character)[0]) > 0


def write_merges(directory: Path, merges: Merges) -> None:
    """Write merges.txt, as `read_merges` reads it."""
    text = "".join(f"{left} {right}\n" for left, right in merges)
    (directory / OWN_MERGES_FILE).write_text(text, encoding="utf-8", newline="\n")


def clean(text: str) -> str:
    """Fix broken text, unescape HTML twice, collapse white space, convert to lower case."""
    text = _unescape(_unescape(_text_fixer()(text)))
    return " ".join(text.split()).lower()


def _unescape(text: str) -> str:
    return html.unescape(_HUGE_NUMBER.sub("\ufffd", text))


def cleaning_versions() -> tuple[str, str]:
    """Name and version of the text fixer, and version of Unicode, which defines letter cases."""
    fixer = "plain"
    if _text_fixer() is not _fix_text:
        from ftfy import __version__ as ftfy_version

        fixer = f"ftfy {ftfy_version}"
    return fixer, unicodedata.unidata_version


@cache
def _text_fixer() -> Callable[[str], str]:
    """Return ftfy's `fix_text` if installed, which also repairs wrongly decoded text."""
    try:
        from ftfy import fix_text
    except ModuleNotFoundError:
        return _fix_text
    return fix_text


def _fix_text(text: str) -> str:
    # Surrogates cannot be encoded; ftfy pairs or replaces them, too.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text.translate(_REPLACEMENTS))


def _byte_tokens() -> list[str]:
    """The first 512 tokens: each byte within a word, then each at the end of a word."""
    letters = list(byte_alphabet())
    return letters + [letter + WORD_END for letter in letters]
