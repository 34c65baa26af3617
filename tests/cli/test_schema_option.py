"""`--schema`, `--choice` and `--regex` of generate."""

import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest

from mlx_fastvlm import ModelError
from mlx_fastvlm.cli import schema_option
from mlx_fastvlm.cli.generate import main
from mlx_fastvlm.cli.schema_option import read_schema

SCHEMA = """{
    "type": "object", "properties": {"many": {"type": "boolean"}}, "required": ["many"],
    "additionalProperties": false
}"""
LONG = '{"type": "string", "minLength": 99}'
needs_llguidance = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None,
    reason="pip install llguidance, the extra schema",
)


def generate(*options: str) -> int:
    return main(["--model", "demo", "--prompt", "How many circles are there?", *options])


@needs_llguidance
def test_schema_from_an_argument_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    for argument in (SCHEMA, str(tmp_path / "schema.json")):
        assert generate("--schema", argument, "--quiet") == 0
        assert isinstance(json.loads(capsys.readouterr().out)["many"], bool)


@needs_llguidance
def test_choice_and_regex(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--choice", "one,two,many more", "--quiet") == 0
    assert capsys.readouterr().out in ("one\n", "two\n", "many more\n")
    assert generate("--regex", "There are [0-9] circles", "--json", "--quiet") == 0
    report = json.loads(capsys.readouterr().out)
    assert re.fullmatch("There are [0-9] circles", report["text"])
    assert report["finish_reason"] == "stop"


@needs_llguidance
@pytest.mark.parametrize("output", [[], ["--json"]])
def test_truncated_answer_is_an_error(
    output: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--schema", LONG, "--max-tokens", "4", "--quiet", *output) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "error: the answer was cut off after 4 tokens, so it may not meet --schema; raise "
        "--max-tokens\n"
    )
    text = json.loads(printed.out)["text"] if output else printed.out
    assert text.startswith('"')


@needs_llguidance
def test_chat_continues_after_a_truncated_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one?\ntwo?\n")))
    options = ["--chat", "--regex", "[a-z]{99}|yes", "--max-tokens", "1", "--quiet"]
    assert main(["--model", "demo", *options]) == 1
    assert capsys.readouterr().err.count("error: the answer was cut off") == 2


@needs_llguidance
def test_unusable_constraints_are_refused_before_loading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options, message in [
        (["--regex", "("], "regex cannot be used: unclosed group"),
        (["--choice", "a,,b"], "choice must be a list of at least one non-empty string"),
        (["--choice", "a,b", "--stop", "a"], "choice and stop texts cannot be combined"),
        (["--schema", '{"oneOf": [{"type": "string"}, {}]}'], "oneOf"),
    ]:
        assert main(["--model", "org/never-downloaded", "--prompt", "q", *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_without_llguidance_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert generate("--choice", "a,b") == 1
    assert capsys.readouterr().err == (
        "error: choice needs the package llguidance; install it with "
        "pip install 'mlx-fastvlm[schema]'\n"
    )


def test_only_one_of_them_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate("--choice", "a,b", "--regex", "a")
    assert "argument --regex: not allowed with argument --choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type": ', "--schema: not valid JSON"),
        ('{"a":' * 100_000, "--schema: not valid JSON (nested too deep)"),
        ("missing.json", "--schema missing.json: cannot be read (No such file or directory)"),
        ("a\0b", "not valid JSON"),
        (".", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
    ],
)
def test_schemas_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_schema(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_schemas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schema.json"
    path.write_text("[1]")
    with pytest.raises(ModelError, match="is not a JSON object"):
        read_schema(str(path))
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_schema(str(path))
    monkeypatch.setattr(schema_option, "MAX_SCHEMA_BYTES", 2)
    with pytest.raises(ModelError, match="larger than"):
        read_schema(str(path))
