"""The direction of imports, what the core path may load, and how long a file may get."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mlx_mobileclip", "mlx_fastvlm", "convert")
MAY_IMPORT = {
    "mlx_mobileclip": {
        *("mlx", "numpy", "PIL", "safetensors", "huggingface_hub", "tokenizers"),
        *("ftfy", "pyarrow"),  # used if installed
    },
    "mlx_fastvlm": {"mlx", "numpy", "tokenizers", "mlx_mobileclip"},
    "convert": {"mlx", "numpy", "PIL", "huggingface_hub", "mlx_mobileclip", "mlx_fastvlm"},
}
MAX_LINES = 450


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, relative imports excluded."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in files(package):
        assert imported(path) <= MAY_IMPORT[package], path.name


@pytest.mark.parametrize("package", PACKAGES)
def test_files_can_be_read_in_one_sitting(package: str) -> None:
    for path in files(package):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path.name
        assert path.stem not in {"utils", "common", "helpers", "base", "misc"}


def test_only_the_loader_calls_the_converter() -> None:
    for package in ("mlx_mobileclip", "mlx_fastvlm"):
        for path in files(package):
            assert path.name == "loader.py" or not re.search(
                r"\bconvert\.\w+\"\)", path.read_text()
            )


def fresh(code: str) -> str:
    """What a new process prints after running the code in the checkout."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_the_core_path_loads_no_heavy_package(tmp_path: Path) -> None:
    """Nor changes the process's limits or environment, up to an answer."""
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
    assert fresh(code) == "[] True"


def test_an_answer_imports_no_more_than_it_uses() -> None:
    """What a user waits for before the first token: these files, these packages, nothing else."""
    code = """
import sys
from mlx_fastvlm.cli import main
main(["--model", "demo", "--image", "examples/scene.png", "--max-tokens", "1", "--quiet"])
print(*sys.modules)
"""
    loaded = set(fresh(code).splitlines()[-1].split())
    files = {
        "mlx_fastvlm": "cache cli config decoding generate image_cache loader model processor "
        "prompt prompt_cache qwen2 sampling swiglu tokenizer",
        "mlx_mobileclip": "attention checkpoint command depthwise device disk_cache errors fastvit "
        "fingerprint gelu hub image linear quantization",
    }
    expected = {f"{package}.{name}" for package in files for name in files[package].split()}
    assert {name for name in loaded if name.startswith(PACKAGES)} == expected | set(files)
    others = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - set(files)
    others = {name for name in others if not name.startswith("_")} - {"sitecustomize"}
    assert others == {"PIL", "mlx", "numpy", "safetensors", "tokenizers"}
    assert (
        not {"asyncio", "email", "http", "importlib.resources", "secrets", "ssl", "tempfile"}
        & loaded
    )


@pytest.mark.parametrize("package", ["mlx_fastvlm", "mlx_mobileclip"])
def test_import_is_quick(package: str) -> None:
    code = f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    assert min(float(fresh(code)) for _ in range(5)) < 0.15


def test_no_code_of_a_checkpoint_can_run() -> None:
    banned = (
        r"trust_remote_code",
        r"(?<![\w.])eval\(",
        r"(?<![\w.])exec\(",
        r"pickle\.load",
        r"jinja2",  # templates are written for other runtimes, never rendered
    )
    for package in PACKAGES:
        for path in files(package):
            source = path.read_text()
            assert not [w for w in banned if re.search(w, source)], path.name
