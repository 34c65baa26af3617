"""CONTRIBUTING.md names files, names in them, and commands that exist."""

import ast
import re
import tomllib

import pytest
from markdown_file import ROOT, Document, code_spans

PAGE = Document("CONTRIBUTING.md")
TEXT = (ROOT / PAGE.name).read_text()
NAMED = re.findall(r"`(\w+)` in `([\w/]+\.py)`", TEXT)
PROSE = "\n".join(line for section in PAGE.sections for line in section.lines)
PATHS = sorted(
    {code for code in code_spans(PROSE) if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", code)}
    | {path for _, path in NAMED}
)


@pytest.mark.parametrize("path", PATHS)
def test_files_exist(path: str) -> None:
    assert (ROOT / path).exists()


def defined(path: str) -> set[str]:
    """Names of the functions, classes and variables defined in a file."""
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    variables = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return variables | {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize(("name", "path"), NAMED)
def test_names_are_in_their_files(name: str, path: str) -> None:
    assert name in defined(path)


def test_names_of_a_command_module_exist() -> None:
    listed = re.search(r"with (`HELP`.*?), as `(.*?)` has them", TEXT)
    assert listed and {*code_spans(listed[1])} <= defined(listed[2])


def test_suites_and_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = {m.partition(":")[0] for m in project["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"pytest -m (\w+)", TEXT)) == markers
    extras = set(project["project"]["optional-dependencies"])
    assert {"parity", *re.findall(r'"\.\[(.*?)\]"', TEXT)[0].split(",")} <= extras


def test_checks_are_those_of_ci() -> None:
    """Every command of the table is in .ci/run, except those that it says are not."""
    ci = (ROOT / ".ci" / "run").read_text()
    rows = PAGE["Checks"].rows()
    [everything] = (row for row in rows if row[1] == "`.ci/run`")
    names = ("-m stress`", "-m clients`", " bench`")
    left_out = [row[1] for row in rows if row[1].endswith(names)]
    assert code_spans(everything[0]) == ["stress", "clients", "bench"] and len(left_out) == 3
    for row in rows:
        if row is not everything and row[1] not in left_out:
            for command in code_spans(row[1])[0].split(" && "):
                assert command in ci
