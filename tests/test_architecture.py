"""Direction of imports, use of the device, imports of the core path, file sizes."""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import permutations
from pathlib import Path
from types import ModuleType

import pytest

import convert
import mlx_fastvlm
import mlx_mobileclip

ROOT = Path(__file__).parents[1]
PACKAGES = ("mlx_mobileclip", "mlx_fastvlm", "convert")
MAY_IMPORT = {
    "mlx_mobileclip": {
        *("mlx", "numpy", "PIL", "safetensors", "huggingface_hub", "tokenizers"),
        *("ftfy", "pyarrow", "pandas", "watchfiles"),  # used if installed
    },
    "mlx_fastvlm": {
        *("mlx", "numpy", "tokenizers", "mlx_mobileclip"),
        *("llguidance", "starlette", "uvicorn", "h11"),  # used if installed
    },
    "convert": {"mlx", "numpy", "PIL", "huggingface_hub", "mlx_mobileclip", "mlx_fastvlm"},
}
MAX_LINES = 400
# Functions that import for themselves, with the reason in their file or docstring.
MAY_ASK_FOR_THE_DEVICE = (
    "mlx_mobileclip/layers.py",
    "mlx_mobileclip/device.py",
    "mlx_mobileclip/cpu/",
)
DEVICE = re.compile(r"\bon_cpu\b|\bon_metal\b|\bdefault_device\b|\bmetal\.is_available\b")


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in files(package)}


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also for types only or within a function."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in files(package):
        tops = {name.partition(".")[0] for name in imports(path)} - sys.stdlib_module_names
        assert tops - {package} <= MAY_IMPORT[package], path


def test_runtime_imports_no_module_by_name() -> None:
    for package in ("mlx_mobileclip", "mlx_fastvlm"):
        for path in files(package):
            assert not re.search(r"import_module|__import__", path.read_text()) or (
                path.name == "__init__.py"  # lazy import of api.py
            )


def test_loading_a_foreign_checkpoint_needs_no_converter(tmp_path: Path) -> None:
    import synthetic

    path = synthetic.write_layout(tmp_path, "fast_vlm")
    code = f"import sys, mlx_fastvlm; mlx_fastvlm.load({str(path)!r}); print(*sys.modules)"
    assert not [name for name in run_code(code).split() if "convert" in name.split(".")]


def test_imports_between_files_have_no_cycle() -> None:
    """Imports for types count. A package imports its own `api` and its command by design."""
    graph = {
        name: {other for other in imports(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    order = TopologicalSorter({name: others & graph.keys() for name, others in graph.items()})
    order.prepare()  # raises CycleError, naming the cycle


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_folders_have_no_cycle(package: str) -> None:
    def folder(module: str) -> str:
        path = MODULES[module]
        return module if path.parent == ROOT / package else ".".join(module.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if name.startswith(f"{package}.") and path.name != "__init__.py":
            others = {m for m in imports(path) if m in MODULES and m.startswith(f"{package}.")}
            graph.setdefault(folder(name), set()).update({folder(m) for m in others})
    TopologicalSorter({name: graph[name] - {name} for name in graph}).prepare()


def test_only_the_layers_ask_for_the_device() -> None:
    for path in MODULES.values():
        if not path.relative_to(ROOT).as_posix().startswith(MAY_ASK_FOR_THE_DEVICE):
            assert not DEVICE.search(path.read_text()), path


def test_models_compute_with_whole_arrays() -> None:
    """Only `layers.py` and `cpu/` handle strips and cores."""
    for package in ("mlx_mobileclip", "mlx_fastvlm"):
        for path in files(f"{package}/models"):
            source = path.read_text()
            assert not re.search(r"\bthen=|import.*\bRows\b|\bstrips?\b[.\[(]|\.cpu\b", source), (
                path
            )


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "bench"])
def test_files_are_short(folder: str) -> None:
    for path in files(folder):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
        assert path.stem not in {"utils", "common", "helpers", "base", "misc"}


def public_names(package: ModuleType) -> list[str]:
    if package is not convert:
        return list(package.__all__)
    listed = {n: v for n, v in vars(package).items() if not n.startswith("_")}
    return [name for name, value in listed.items() if not isinstance(value, ModuleType)]


def test_no_module_shares_its_name_with_a_public_function() -> None:
    names = {name for package in (mlx_fastvlm, mlx_mobileclip) for name in public_names(package)}
    shared = [module for module in MODULES if module.rpartition(".")[2] in names]
    assert shared == ["mlx_fastvlm.cli.generate", "mlx_fastvlm.generate"]
    assert not {name.rpartition(".")[2] for name in MODULES if "." in name} & {
        *public_names(convert)
    }


def test_public_names_exist() -> None:
    for package in (mlx_fastvlm, mlx_mobileclip, convert):
        assert public_names(package)
        for name in public_names(package):
            assert not isinstance(getattr(package, name), ModuleType)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing
    namespace: dict[str, object] = {}
    exec("from mlx_fastvlm import *; from mlx_mobileclip import recall", namespace)
    assert callable(namespace["generate"]) and callable(namespace["recall"])


def run_code(code: str, *options: str) -> str:
    """Run code in a new process in the checkout; returns its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    result = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


STEPS = {
    "module": "import mlx_fastvlm.generate",
    "function": "from mlx_fastvlm import generate; assert callable(generate)",
    "command": "import mlx_fastvlm.generate.__main__",
    "walk": "import pkgutil, mlx_fastvlm as p; [importlib.import_module(m.name) for m in "
    "pkgutil.walk_packages(p.__path__, 'mlx_fastvlm.')]",
}


def test_generate_is_the_function_in_every_order_of_imports() -> None:
    """Each order runs in a forked process, which is quicker than starting one."""
    code = f"""
import importlib, itertools, os, sys
import starlette.routing, uvicorn.protocols.http.h11_impl  # once, as they take long
steps = {STEPS!r}
for order in itertools.permutations(steps):
    child = os.fork()
    if not child:
        status = 1
        try:
            for step in order:
                exec(steps[step], dict(importlib=importlib))
                import mlx_fastvlm
                assert callable(mlx_fastvlm.generate), (order, step)
                assert type(mlx_fastvlm.generate).__name__ == "function", (order, step)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, order
print("done")
"""
    assert len(list(permutations(STEPS))) == 24
    assert run_code(code, "-W", "error") == "done"


@pytest.mark.parametrize(
    "module",
    ["mlx_fastvlm.generate", "mlx_fastvlm.server", "mlx_fastvlm", "mlx_mobileclip", "convert"],
)
def test_commands_start_without_a_warning(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: ") and not done.stderr


def test_every_module_can_be_imported() -> None:
    for package in (mlx_fastvlm, mlx_mobileclip, convert):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def test_core_path_loads_no_heavy_package(tmp_path: Path) -> None:
    """Nor does it change the limits or the environment of the process."""
    import synthetic

    path = synthetic.write_layout(tmp_path, "mlx-vlm")
    code = f"""
import os, resource, sys
limits, environment = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ)
import mlx_fastvlm, mlx_mobileclip
from mlx_fastvlm import generate, load
generate(*load({str(path)!r}), "q", max_tokens=2)
heavy = {{"torch", "transformers", "mlx_lm", "jinja2", "huggingface_hub"}} & set(sys.modules)
same = limits == resource.getrlimit(resource.RLIMIT_NOFILE) and environment == dict(os.environ)
print(sorted(heavy), same)
"""
    assert run_code(code) == "[] True"


def test_answer_imports_only_what_it_uses() -> None:
    """Imports delay the first token, so only these folders and packages are allowed."""
    code = """
import sys
from mlx_fastvlm.cli.generate import main
main(["--model", "demo", "--image", "examples/scene.png", "--max-tokens", "1", "--quiet"])
print(*sys.modules)
"""
    loaded = set(run_code(code).splitlines()[-1].split())
    ours = {name for name in loaded if name.startswith(PACKAGES)}
    assert {name for name in ours if name.startswith("mlx_mobileclip.")} <= MODULES.keys()
    unused = ("eval", "embedding", "train", "api", "loader", "models.clip")
    assert not {f"mlx_mobileclip.{name}" for name in unused} & ours
    others = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    others = {name for name in others if not name.startswith("_")} - {"sitecustomize"}
    assert others == {"PIL", "mlx", "numpy", "safetensors", "tokenizers", *PACKAGES[:2]}
    assert (
        not {"asyncio", "email", "http", "importlib.resources", "secrets", "ssl", "tempfile"}
        & loaded
    )


@pytest.mark.parametrize("package", ["mlx_fastvlm", "mlx_mobileclip"])
def test_import_is_quick(package: str) -> None:
    code = f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    assert min(float(run_code(code)) for _ in range(5)) < 0.15


def test_no_code_of_a_checkpoint_can_run() -> None:
    banned = (
        r"trust_remote_code",
        r"(?<![\w.])eval\(",
        r"(?<![\w.])exec\(",
        r"pickle\.load",
        r"jinja2",  # templates are written for other runtimes, never rendered
    )
    for path in MODULES.values():
        source = path.read_text()
        assert not [w for w in banned if re.search(w, source)], path


def test_one_function_writes_to_stderr() -> None:
    """`terminal.say`, which removes control characters."""
    for path in MODULES.values():
        if path != ROOT / "mlx_mobileclip/terminal.py":
            names = set(re.findall(r"\w+", "".join(code_of(path))))
            assert not names & {"stderr", "__stderr__", "print_exc", "StreamHandler"}, path
            assert "cli" in path.parts or "print" not in names, path


def code_of(path: Path) -> Iterator[str]:
    """The names that a file uses, without comments and strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            yield f"{node.id} "
        elif isinstance(node, ast.Attribute):
            yield f"{node.attr} "
        elif isinstance(node, ast.alias):
            yield f"{node.name} "


def test_every_file_is_in_architecture_md() -> None:
    """docs/architecture.md has a line for each file, and none for removed files."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text[text.index("## Files") :].split("```")[1]
    listed, folders = set(), []
    for line in tree.splitlines():
        match = re.match(r"( *)([\w.]+/?)(?: |$)", line)
        if not match:
            continue
        depth, name = len(match[1]) // 2, match[2]
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            listed.add("".join(folders))
    ours = {path.relative_to(ROOT).as_posix() for path in MODULES.values()}
    assert listed == {name for name in ours if not name.endswith("__init__.py")}
