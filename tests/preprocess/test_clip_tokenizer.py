"""MobileCLIP checkpoints with their own merges.txt, valid and hostile."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from synthetic_clip import tiny_config

from convert import __main__ as converter
from convert.write import write_tensors
from mlx_mobileclip import ConfigError, load
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.models.clip import MobileCLIP
from mlx_mobileclip.preprocess.tokenizer import (
    MAX_MERGES_BYTES,
    clip_tokenizer,
    read_merges,
    write_merges,
)

Build = Callable[[Path], object]
MERGES = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("Ã", "©</w>")]
SIZE = 512 + len(MERGES) + 2
START, END = SIZE - 2, SIZE - 1


def write(path: Path, vocab_size: int = SIZE, context_length: int = 77) -> Path:
    """Write a canonical checkpoint with random weights, and MERGES if they fit its vocabulary."""
    config = tiny_config("MobileCLIP2-S0")
    assert config.text is not None
    text = replace(config.text, vocab_size=vocab_size, context_length=context_length)
    config = replace(config, text=text)
    rng = np.random.default_rng(0)
    weights = {
        name: mx.array(rng.normal(0, 0.1, value.shape).astype(np.float32))
        for name, value in named_parameters(MobileCLIP(config)).items()
    }
    path.mkdir()
    write_tensors(path, weights)
    (path / "config.json").write_text(json.dumps(config.to_json()))
    if vocab_size == SIZE:
        write_merges(path, MERGES)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tokenizer") / "sound")


def test_ids_follow_from_the_merges(sound: Path) -> None:
    """Ids are 256 bytes, 256 bytes at the end of a word, merges, start and end, in this order."""
    model, processor = load(sound)
    ids = np.array(processor.texts(["Red cat", "é a<end_of_text>"]))
    assert ids.shape == (2, 77) and ids.max() == END
    assert ids[0, :5].tolist() == [START, 512 + 3, 512 + 1, END, 0]
    a, less = (256 + ord(letter) - ord("!") for letter in "a<")
    assert ids[1, :4].tolist() == [START, 512 + 4, a, less]
    embeddings = model.encode_text(mx.array(ids), normalize=True)
    assert mx.isfinite(embeddings).all().item()


def test_context_length_of_the_config_is_used(tmp_path: Path) -> None:
    for vocab_size in (SIZE, 49408):
        model, processor = load(write(tmp_path / f"{vocab_size}", vocab_size, 16))
        assert processor.texts(["a cat"]).shape == (1, 16)
        with pytest.warns(UserWarning, match="reads the first 14"):
            ids = processor.texts(["é " * 40])
        assert ids[0, -1].item() == vocab_size - 1
        assert model.encode_text(ids).shape[0] == 1


def test_clip_vocabulary_ignores_merges_file(tmp_path: Path) -> None:
    path = write(tmp_path / "clip", 49408)
    (path / "merges.txt").write_text("of another program")
    _, processor = load(path)
    assert processor.tokenizer is clip_tokenizer()


def test_conversion_keeps_the_tokenizer(sound: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    options = ["--model", str(sound), "--mlx-path", str(target), "--dtype", "float32", "--verify"]
    assert converter.main(options) == 0
    for name in ("merges.txt", "config.json"):
        ours, theirs = (json_or_bytes(folder / name) for folder in (target, sound))
        assert ours == theirs
    ours, theirs = (load(folder)[1].texts(["red cat"]) for folder in (target, sound))
    assert mx.array_equal(ours, theirs).item()


def json_or_bytes(path: Path) -> object:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def test_command_line_uses_the_tokenizer(sound: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("red\ncat\n")
    options = ["--model", str(sound), "--texts", str(texts), "--output", str(tmp_path / "x.npz")]
    result = subprocess.run(
        [sys.executable, "-m", "mlx_mobileclip", "embed", *options, "--quiet"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    model, processor = load(sound)
    expected = model.encode_text(processor.texts(["red", "cat"]), normalize=True)
    found = np.load(tmp_path / "x.npz")["embeddings"]
    assert np.abs(found - np.array(expected)).max() < 1e-5


def test_clip_merges_survive_a_round_trip(tmp_path: Path) -> None:
    """merges.txt can hold CLIP's own merges."""
    import gzip
    from importlib import resources

    data = resources.files("mlx_mobileclip").joinpath("data", "bpe_simple_vocab_16e6.txt.gz")
    text = gzip.decompress(data.read_bytes()).decode().split("\n", 1)[1]
    merges = [tuple(line.split(" ")) for line in text.split("\n")[:40000]]
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, merges)), encoding="utf-8")
    assert read_merges(tmp_path, 512 + 40000 + 2) == merges


def text(data: str | bytes) -> Build:
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


GOOD = "c a\nca t</w>\nr e\nre d</w>\n"  # one short of MERGES
HOSTILE: dict[str, tuple[Build, str]] = {
    "missing": (lambda path: None, r"is missing; a vocabulary of 519, unlike CLIP's 49408"),
    "a pipe": (lambda path: os.mkfifo(path), "is not a regular file"),
    "a directory": (lambda path: path.mkdir(), "is not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is missing"),
    "too large": (
        lambda path: (path.touch(), os.truncate(path, MAX_MERGES_BYTES + 1)),
        "larger than 4 MB",
    ),
    "full of lines": (text("\n" * MAX_MERGES_BYTES), "line 1, '', is not two known tokens"),
    "one line": (text("a" * MAX_MERGES_BYTES), "line 1, 'a{40}', is not"),
    "no UTF-8": (text(GOOD.encode() + b"\xff \xfe\n"), r"cannot be read \('utf-8'"),
    "half a surrogate": (text(GOOD.encode() + b"\xed\xa0\x80 a\n"), r"cannot be read \('utf-8'"),
    "empty": (text(""), "line 1, '', is not"),
    "a header": (text("#version: 0.2\n" + GOOD), "line 1, '#version: 0.2', is not"),
    "an empty line": (text("c a\n\nca t</w>\n"), "line 2, '', is not"),
    "Windows line ends": (text(GOOD.replace("\n", "\r\n")), "line 1, .*, is not"),
    "one piece": (text(GOOD + "ab\n"), "line 5, 'ab', is not"),
    "three pieces": (text(GOOD + "a b c\n"), "line 5, 'a b c', is not"),
    "two spaces": (text(GOOD + "a  b\n"), "line 5, 'a  b', is not"),
    "a tab": (text(GOOD + "a\tb\n"), "line 5, .*, is not"),
    "nothing and a piece": (text(GOOD + " a\n"), "line 5, ' a', is not"),
    "unknown pieces": (text(GOOD + "qq zz\n"), "line 5, 'qq zz', is not two known"),
    "pieces known later": (text("ca t</w>\nc a\n"), "line 1, .*, is not"),
    "a character as it is": (text(GOOD + "é \u3042\n"), "line 5, .*, is not"),
    "control characters": (text(GOOD + "a \x1b[2J\n"), "line 5, .*, is not"),
    "a merge twice": (text(GOOD + "r e\n"), "line 5 repeats the token 're'"),
    "a token twice": (text(GOOD + "a t</w>\nc at</w>\n"), "line 6 repeats the token 'cat</w>'"),
    "a byte's token": (text(GOOD + "a </w>\n"), "line 5, .*, is not"),
    "too few": (text(GOOD), "4 merges make a vocabulary of 518, not of 519"),
    "too many": (text(GOOD + "e r\ne n\n"), "6 merges make a vocabulary of 520, not of 519"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_merges_are_refused(name: str, sound: Path, tmp_path: Path) -> None:
    build, reason = HOSTILE[name]
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).hardlink_to(sound / file)
    build(tmp_path / "merges.txt")
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=reason) as caught:
        load(tmp_path)
    assert time.perf_counter() - started < 5
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'merges.txt'}: ") and message.isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize("vocab_size", [2, 512, 514, 1_000_000])
def test_vocabulary_size_must_match_the_merges(vocab_size: int, tmp_path: Path) -> None:
    write_merges(tmp_path, MERGES)
    with pytest.raises(ConfigError, match=f"vocabulary of {SIZE}, not of {vocab_size} as config"):
        read_merges(tmp_path, vocab_size)


def test_largest_allowed_file_is_quick(tmp_path: Path) -> None:
    """Merges as long as the file allows cost no more than reading them."""
    lines, piece, size = [], "a", 0
    while size + 2 * len(piece) + 2 <= MAX_MERGES_BYTES:
        lines.append(f"{piece} {piece}")
        size += len(lines[-1]) + 1
        piece += piece
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    started = time.perf_counter()
    merges = read_merges(tmp_path, 512 + len(lines) + 2)
    assert merges is not None and len(merges) == len(lines)
    assert time.perf_counter() - started < 5


def test_conversion_refuses_hostile_merges(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in ("config.json", "model.safetensors"):
        (source / file).hardlink_to(sound / file)
    (source / "merges.txt").write_text("a b c\n")
    options = ["--model", str(source), "--mlx-path", str(tmp_path / "out")]
    assert converter.main(options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "line 1" in error
    assert not (tmp_path / "out").exists()
