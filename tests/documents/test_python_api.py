"""docs/python-api.md has every public name with its parameters and defaults; its examples run."""

import ast
import inspect
import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_file import ROOT, Document, Section, code_spans

import convert
import mlx_fastvlm
import mlx_mobileclip

PAGE = Document("docs/python-api.md")
SHARED = "Both packages"
SAME_PARAMETERS = {"ConvertOptions": "convert"}  # described under another name


def public_names(package: ModuleType) -> list[str]:
    if hasattr(package, "__all__"):
        return list(package.__all__)
    values = {n: v for n, v in vars(package).items() if not n.startswith("_")}
    return [n for n, v in values.items() if not isinstance(v, ModuleType)]


NAMES = [
    (package.__name__, name, getattr(package, name))
    for package in (mlx_fastvlm, mlx_mobileclip, convert)
    for name in public_names(package)
]
ERRORS = {n for _, n, v in NAMES if inspect.isclass(v) and issubclass(v, Exception)}
DOCUMENTED = [named for named in NAMES if named[1] not in ERRORS]


def section_of(package: str, name: str) -> Section:
    found = [s for s in PAGE.sections if s.titles in ((package, name), (SHARED, name))]
    assert len(found) == 1, f"{package}.{name} has {len(found)} sections"
    return found[0]


def listed(section: Section) -> dict[str, list[str] | None]:
    """Names in the first column of a section's tables; methods with their parameters."""
    members: dict[str, list[str] | None] = {}
    for row in section.rows():
        for code in code_spans(row[0]):
            name, method, inside = code.partition("(")
            members[name] = inside.rstrip(")").replace(" ", "").split(",") if method else None
            if members[name] == [""]:
                members[name] = []
    return members


def parameters(value: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(value).parameters)


def default(value: Any, parameter: inspect.Parameter) -> Any:
    if is_dataclass(value):
        for field in fields(value):
            if field.name == parameter.name and field.default_factory is not MISSING:
                return field.default_factory()
    return parameter.default


def stated_signature(section: Section) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Name, kind and default of each parameter in the first block of code."""
    [function] = ast.parse(f"def {section.blocks[0][1]}: ...").body
    assert isinstance(function, ast.FunctionDef)
    code = ast.unparse(function.args)
    made: Callable[..., Any] = eval(f"lambda {code}: None")
    found = inspect.signature(made).parameters.values()
    return function.name, [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize(("package", "name", "value"), DOCUMENTED)
def test_signatures_are_documented(package: str, name: str, value: Any) -> None:
    stated_name, stated = stated_signature(section_of(package, name))
    actual = [(p.name, p.kind, default(value, p)) for p in parameters(value).values()]
    assert (stated_name, stated) == (name, actual)


@pytest.mark.parametrize(("package", "name", "value"), DOCUMENTED)
def test_parameters_and_members_are_documented(
    package: str, name: str, value: Any, demo: dict[str, Any]
) -> None:
    rows = listed(section_of(package, name))
    if name in SAME_PARAMETERS:
        rows |= listed(section_of(package, SAME_PARAMETERS[name]))
    expected: dict[str, list[str] | None] = dict.fromkeys(parameters(value))
    if inspect.isclass(value):
        expected |= members(value)
    missing = expected.keys() - rows.keys()
    assert not missing, f"missing in the document: {sorted(missing)}"
    instance = demo.get(f"{package}.{name}")
    unknown = {n for n in rows.keys() - expected.keys() if not hasattr(instance, n)}
    assert not unknown, f"in the document, but not in the code: {sorted(unknown)}"
    for member, arguments in expected.items():
        assert rows[member] == arguments, member


def members(value: type) -> dict[str, list[str] | None]:
    """Public attributes of a class, and the parameters of its methods without `self`."""
    found: dict[str, list[str] | None] = {}
    for name, member in vars(value).items():
        if name.startswith("_") and name != "__call__":
            continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        method = inspect.isfunction(function)
        found[name] = list(inspect.signature(function).parameters)[1:] if method else None
    return found


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """Instances; the page may also document their attributes."""
    fastvlm, fastvlm_processor = mlx_fastvlm.load("demo")
    mobileclip, mobileclip_processor = mlx_mobileclip.load("demo")
    return {
        "mlx_fastvlm.FastVLM": fastvlm,
        "mlx_fastvlm.Processor": fastvlm_processor,
        "mlx_mobileclip.MobileCLIP": mobileclip,
        "mlx_mobileclip.Processor": mobileclip_processor,
    }


def test_errors_are_documented() -> None:
    assert set(listed(PAGE["Errors"])) == ERRORS
    of_fastvlm = {n for p, n, _ in NAMES if p == "mlx_fastvlm"}
    for row in PAGE["Errors"].rows():
        [name] = code_spans(row[0])
        assert ("only in" in row[1]) == (name not in of_fastvlm), name


def test_every_section_names_an_existing_object() -> None:
    packages = {"mlx_fastvlm", "mlx_mobileclip", "convert", SHARED}
    titles = {s.titles for s in PAGE.sections if len(s.titles) == 2 and s.titles[0] in packages}
    known = {(package, name) for package, name, _ in NAMES}
    known |= {(SHARED, name) for _, name, _ in NAMES} | {(SHARED, "Errors")}
    assert not titles - known


def test_names_in_comparison_tables_exist() -> None:
    """Every name of ours in the comparison tables exists."""
    names = {name for _, name, _ in NAMES}
    for _, _, value in NAMES:
        names |= parameters(value).keys()
        names |= members(value).keys() if inspect.isclass(value) else set()
    cli = set(re.findall(r"--[\w-]+", (ROOT / "docs" / "cli.md").read_text()))
    sections = PAGE.under("Compared with other libraries")
    assert len(sections) == 4
    for section in sections:
        for row in section.rows():
            for code in code_spans(row[1]):
                words = re.findall(r"--[\w-]+|^\w+", code)
                assert {*words} <= names | cli, code


def runnable() -> list[str]:
    blocks = [block for section in PAGE.sections for block in section.blocks]
    assert {language for language, _ in blocks} == {"python", "python runnable"}
    return [code for language, code in blocks if language == "python runnable"]


def test_examples_run_and_print_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for code in runnable():
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(code, namespace)
        expected = re.findall(r"^(?:print\(.*\)  )?# (.*)$", code, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected, code
