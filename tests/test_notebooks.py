"""The notebooks in examples/: they run, offline, on the demo models, and say what they should."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
REAL_MODELS = {
    "ask_about_images": ("apple/FastVLM-0.5B", "apple/MobileCLIP2-S0"),
    "zero_shot_classification": ("apple/MobileCLIP2-S0",),
}
SAYS = {
    "ask_about_images": (
        "There are 2 circles.\n",
        "A large green circle. The text says SHOE.\n",
        "The text says TRAIN.\nThere are 2 circles.\nThere is 1 circle.\n",
        "scene.png: a red circle, a blue heart, an orange circle and a purple square\n",
        "scene2.png: a red square\nscene3.png: a green circle\nscene4.png: a purple heart\n",
    ),
    "zero_shot_classification": (
        "(1, 256, 256, 3) -> (1, 128)\n",
        "scene2.png: red square ",
        "scene3.png: green circle ",
        "scene4.png: purple heart ",
    ),
}


def read(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def sources(notebook: dict[str, Any], kind: str) -> list[str]:
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


@pytest.fixture(scope="module")
def fonts() -> None:
    """Where matplotlib has to look for fonts first, it says so on stderr."""
    subprocess.run([sys.executable, "-c", "import matplotlib.pyplot"], check=True)


def test_these_are_all() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == SAYS.keys() == REAL_MODELS.keys()


@pytest.mark.parametrize("name", SAYS)
def test_it_is_stored_as_it_should_be(name: str) -> None:
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


@pytest.mark.parametrize("name", REAL_MODELS)
def test_it_names_the_line_to_change(name: str) -> None:
    notebook = read(name)
    loads = "\n".join(sources(notebook, "code")).count('load("demo")')
    prose = "\n".join(sources(notebook, "markdown"))
    assert loads == len(REAL_MODELS[name])
    assert all(f'`load("{model}")`' in prose for model in REAL_MODELS[name])


@pytest.mark.parametrize("name", SAYS)
def test_it_runs(name: str, fonts: None, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    env |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "MLX_MOBILECLIP_CACHE": str(tmp_path)}
    env["PYTHONPATH"] = str(EXAMPLES.parent)
    code = "\n".join(sources(read(name), "code"))
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=EXAMPLES, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    for text in SAYS[name]:
        assert text in result.stdout
