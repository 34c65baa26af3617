"""CLIP's byte-pair tokenizer: text to a fixed number of ids, 77 in CLIP, padded with 0.

Text is cleaned, cut into words, numbers and marks, and each piece is merged from bytes up by a
fixed list; the last piece of a word carries "</w>". Special tokens are never read from text: a
typed "<end_of_text>" stays text, since it would move the place that the text tower reads out.

Source: open_clip 3.3.0 `tokenizer.py` (SimpleTokenizer), the same as in apple/ml-mobileclip
4144bb1 `mobileclip/modules/text/tokenizer.py`. The merges are OpenAI's, see data/LICENSE-CLIP;
a checkpoint with a vocabulary of its own brings its merges in merges.txt.
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
MERGES = 49152 - 256 - 2  # of the file's lines; the rest was never given ids
BASE = 2 * 256 + 2  # ids that are no merge: each byte within and at the end of a word, start, end
CLIP_VOCABULARY = BASE + MERGES
OWN_MERGES_FILE = "merges.txt"
MAX_MERGES_BYTES = 4 << 20  # CLIP's take half a megabyte
WORD_END = "</w>"
# U+0345 drops out, as in the reference, to whose case-blind pattern it is no mark and no letter.
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
MAX_TEXT = 10_000  # characters read; far more than 77 ids can cover
MAX_MARKS = 256  # in a row; NFC takes quadratic time in their number
SHOWN = 40  # characters of a text in a message

Merges = list[tuple[str, str]]

# What ftfy changes in text that is not broken, for when it is not installed.
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
_PLAIN = _QUOTES | _LIGATURES | _WIDTHS | _CONTROLS
_HUGE_NUMBER = re.compile("&#[0-9]{1000,};?")  # int() refuses more digits than 4300


class Tokenizer:
    """Byte-pair encoding with one list of merges."""

    def __init__(self, merges: Sequence[tuple[str, str]], context_length: int = CONTEXT_LENGTH):
        """Build from merges in order of priority.

        Args:
            merges: Pairs of pieces, in the printable stand-ins for bytes.
            context_length: Ids of every text.
        """
        tokens = _byte_tokens()
        tokens += [left + right for left, right in merges]
        vocab = {token: i for i, token in enumerate(tokens)}
        model = models.BPE(vocab=vocab, merges=list(merges), end_of_word_suffix=WORD_END)
        self._backend = Backend(model)
        words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._backend.pre_tokenizer = pre_tokenizers.Sequence([words, by_bytes])
        self.start_id, self.end_id = len(tokens), len(tokens) + 1
        self.context_length = context_length

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the ids of a text follow from: 64 hexadecimal digits."""
        content = (self._backend.to_str(), self.context_length, *cleaning(), tokenizers_version)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def may_be_cut(self, text: str) -> bool:
        """Whether a text could be too long; False only if it surely is not.

        Cleaning makes plain text no longer, and no id stands for less than a byte.
        """
        return len(text) > self.context_length - 2 or not text.isascii() or "&" in text

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start, end and padding."""
        return list(self._backend.encode(clean(text), add_special_tokens=False).ids)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Ids of some texts, ready for the text tower.

        Args:
            texts: At least one text.

        Returns:
            (B, L), L the context length: start, text, end, zeros. A text that is too long loses
            its tail, not its end token, and a warning says so.

        Raises:
            PromptError: not a list of texts, or one with more than 256 combining marks in a row.
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
    """The tokenizer of every published model; 49408 ids."""
    data = resources.files(DATA_PACKAGE).joinpath("data", MERGES_FILE).read_bytes()
    lines = gzip.decompress(data).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [line.split() for line in lines]
    return Tokenizer([(left, right) for left, right in merges], context_length)


def read_merges(directory: Path, vocab_size: int) -> Merges | None:
    """The merges that a checkpoint brings in merges.txt; None if its vocabulary is CLIP's.

    A line holds the two pieces of a merge, a space between them, in the order of priority.

    Raises:
        ConfigError: the file is missing, malformed, or does not make up the vocabulary.
    """
    if vocab_size == CLIP_VOCABULARY:
        return None
    path = directory / OWN_MERGES_FILE
    try:
        lines = read_bounded(path, MAX_MERGES_BYTES).decode("utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: is missing; a vocabulary of {vocab_size}, unlike CLIP's {CLIP_VOCABULARY}, "
            "needs it; copy it there from the checkpoint's source"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); download it again") from error
    known, merges = set(_byte_tokens()), Merges()
    for number, line in enumerate(lines, 1):
        left, space, right = line.partition(" ")
        if not space or left not in known or right not in known:
            raise ConfigError(
                f"{path}: line {number}, {line[:SHOWN]!r}, is not two known pieces with a space "
                "between them; the checkpoint cannot be used"
            )
        if left + right in known:
            raise ConfigError(
                f"{path}: line {number} makes {(left + right)[:SHOWN]!r} a second time; "
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
    """Whether NFC reorders it; some characters are reordered only after decomposition."""
    return unicodedata.combining(unicodedata.normalize("NFD", character)[0]) > 0


def write_merges(directory: Path, merges: Merges) -> None:
    """Write what `read_merges` reads."""
    text = "".join(f"{left} {right}\n" for left, right in merges)
    (directory / OWN_MERGES_FILE).write_text(text, encoding="utf-8", newline="\n")


def clean(text: str) -> str:
    """Mend, unescape HTML twice, collapse white space, lower."""
    text = _unescape(_unescape(_mender()(text)))
    return " ".join(text.split()).lower()


def _unescape(text: str) -> str:
    return html.unescape(_HUGE_NUMBER.sub("\ufffd", text))


def cleaning() -> tuple[str, str]:
    """What texts are mended with, and the version of Unicode that decides on letters and cases."""
    mender = "plain"
    if _mender() is not _mend:
        from ftfy import __version__ as ftfy_version

        mender = f"ftfy {ftfy_version}"
    return mender, unicodedata.unidata_version


@cache
def _mender() -> Callable[[str], str]:
    """What mends broken text: ftfy if installed, which also undoes wrong decoding."""
    try:
        from ftfy import fix_text
    except ModuleNotFoundError:
        return _mend
    return fix_text


def _mend(text: str) -> str:
    # Surrogates would not encode; ftfy pairs or replaces them too.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text.translate(_PLAIN))


def _byte_tokens() -> list[str]:
    """The first 512 tokens: each byte within a word, then each at the end of one."""
    letters = list(byte_alphabet())
    return letters + [letter + WORD_END for letter in letters]
