"""docs/cli.md has every option of every parser with its argument and default, and no others."""

import argparse
import json
import re
import shlex

import pytest
from markdown_file import ROOT, Document, Section, code_spans

from convert.__main__ import build_parser as convert_parser
from mlx_fastvlm.check import command as check
from mlx_fastvlm.cli import generate
from mlx_fastvlm.server import command as server
from mlx_mobileclip.__main__ import COMMANDS
from mlx_mobileclip.__main__ import build_parser as mobileclip_parser
from mlx_mobileclip.cli.classify_command import COLUMNS

PAGE = Document("docs/cli.md")
PACKAGES = ("mlx_mobileclip", "mlx_fastvlm", "convert")
SHARED = "mlx-mobileclip"  # the section of the options that its commands share


def subparser(name: str) -> argparse.ArgumentParser:
    actions = mobileclip_parser()._actions
    [commands] = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]


PARSERS = {  # by section
    "mlx-fastvlm generate": generate.build_parser("mlx-fastvlm generate"),
    "mlx-fastvlm check": check.build_parser("mlx-fastvlm check"),
    "mlx-fastvlm server": server.build_parser("mlx-fastvlm server"),
    **{f"mlx-mobileclip {name}": subparser(name) for name in COMMANDS},
    "convert": convert_parser(),
}


def option_rows(section: Section) -> dict[str, list[str]]:
    """Rows of tables of options by the longest spelling of the option."""
    rows = {}
    for row in section.rows():
        spellings = [code.split()[0] for code in code_spans(row[0]) if code.startswith("-")]
        if spellings:
            assert spellings[-1] not in rows, f"{spellings[-1]} stands twice in {section.titles}"
            rows[spellings[-1]] = row
    return rows


def takes_model(parser: argparse.ArgumentParser) -> bool:
    return "--model" in parser._option_string_actions


def rows_of(title: str) -> dict[str, list[str]]:
    """The rows of a command's own options and of those that it shares."""
    own = option_rows(PAGE[title])
    takes_a_model = title.startswith(f"{SHARED} ") and takes_model(PARSERS[title])
    shared = option_rows(PAGE[SHARED]) if takes_a_model else {}
    assert not own.keys() & shared.keys()
    return own | shared


@pytest.mark.parametrize("title", PARSERS)
def test_every_option_is_documented(title: str) -> None:
    rows = rows_of(title)
    options = [action for action in PARSERS[title]._actions if action.option_strings]
    actions = {action.option_strings[-1]: action for action in options}
    assert not actions.keys() - rows.keys(), "missing in the document"
    assert not rows.keys() - actions.keys(), "in the document, but not in the parser"
    for name, action in actions.items():
        assert action.help, name
        first, _, default = rows[name]
        *spellings, last = [code for code in code_spans(first) if code.startswith("-")]
        assert [*spellings, last.split()[0]] == list(action.option_strings)
        if action.choices is not None and action.metavar is None:
            assert code_spans(first)[1:] == [str(choice) for choice in action.choices], name
        else:
            assert last.split()[1:] == ([] if action.nargs == 0 else [action.metavar]), name
        value = action.default
        if action.required:
            assert default == "required", name
        elif action.nargs != 0 and value not in (None, []):
            assert default == f"`{value}`", name


def test_shared_options_are_shared() -> None:
    for name in COMMANDS:
        if takes_model(subparser(name)):
            strings = subparser(name)._option_string_actions.keys()
            assert option_rows(PAGE[SHARED]).keys() <= strings


def test_every_command_has_a_section() -> None:
    """The other tests would not notice a command without a section."""
    [table] = PAGE.introduction.tables()
    assert {code_spans(row[1])[0] for row in table} == {
        name.replace("convert", "mlx-fastvlm-convert") for name in PARSERS
    }
    with_options = {s.titles[-1] for s in PAGE.sections if s.titles and option_rows(s)}
    assert with_options == {*PARSERS, SHARED}


def examples() -> list[str]:
    blocks = [code for section in PAGE.sections for _, code in section.blocks]
    return [line for code in blocks for line in code.splitlines()]


@pytest.mark.parametrize("line", examples())
def test_examples_can_be_parsed(line: str) -> None:
    arguments = shlex.split(line.replace("python -m mlx_fastvlm.", "mlx-fastvlm "))
    if arguments[:3] == ["python", "-m", "convert"]:
        PARSERS["convert"].parse_args(arguments[3:])
    else:
        PARSERS[" ".join(arguments[:2])].parse_args(arguments[2:])


def test_json_fields_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--model", "demo", "--prompt", "Hi", "--max-tokens", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = PAGE["mlx-fastvlm generate"].tables()[-1]
    assert [name for row in rows for name in code_spans(row[0])] == list(report)
    [timings] = (row for row in rows if row[0] == "`timings`")
    assert code_spans(timings[1]) == list(report["timings"])


def test_csv_columns_are_documented() -> None:
    text = "\n".join(PAGE["mlx-mobileclip classify"].lines)
    listed = re.search(r"`csv` has the columns (.*?)\. ?", text)
    assert listed and tuple(code_spans(listed[1])) == COLUMNS


READ = re.compile(r"os\.(?:environ\.get|getenv)\((\S+?)[,)]|os\.environ\[(\S+?)\](?! = )")


def read_constants(source: str) -> dict[str, str]:
    """Constants of a file that are texts, in quotes."""
    return dict(re.findall(r'^([A-Z_]+) = (".+?")', source, re.MULTILINE))


def read_variables(source: str, shared: dict[str, str]) -> set[str]:
    """Environment variables that a file reads, as literals, its own constants or shared ones."""
    constants = shared | read_constants(source)
    found = ["".join(groups) for groups in READ.findall(source)]
    return {constants.get(name, name).strip('"') for name in found}


def test_environment_variables_are_documented() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    rows = PAGE["Environment variables"].rows()
    shared = {k: v for path in paths for k, v in read_constants(path.read_text()).items()}
    read = [read_variables(path.read_text(), shared) for path in paths]
    assert {code_spans(row[0])[0] for row in rows} == set().union(*read)


def test_exit_statuses_are_documented() -> None:
    rows = PAGE["Output and exit status"].rows()
    assert [row[0] for row in rows] == ["0", "1", "2", "130"]
