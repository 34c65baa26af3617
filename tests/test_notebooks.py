"""The notebooks in examples/ run offline on the demo models; their stored outputs are current."""

import base64
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
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.png"  # shown in README.md


def read(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def sources(notebook: dict[str, Any], kind: str) -> list[str]:
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


@pytest.fixture(scope="module")
def fonts() -> None:
    """Build matplotlib's font cache first, which it reports on stderr."""
    subprocess.run([sys.executable, "-c", "import matplotlib.pyplot"], check=True)


def outputs(cell: dict[str, Any], kind: str) -> list[str]:
    """Printed outputs ("stream") or images ("image/png") of a cell."""
    if kind == "stream":
        return ["".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream"]
    return ["".join(o["data"][kind]) for o in cell["outputs"] if kind in o.get("data", {})]


def test_all_notebooks_are_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == REAL_MODELS.keys()


@pytest.mark.parametrize("name", REAL_MODELS)
def test_notebook_is_stored_with_outputs(name: str) -> None:
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        source = "".join(cell["source"])
        assert bool(outputs(cell, "stream")) == ("print(" in source), cell["id"]
        shows = "plt.subplots" in source or source.startswith("Image.open")
        assert bool(outputs(cell, "image/png")) == shows, cell["id"]
        assert not any(o["output_type"] == "error" for o in cell["outputs"])


def test_picture_in_readme_is_a_notebook_s() -> None:
    *_, last = (cell for cell in read("ask_about_images")["cells"] if cell["cell_type"] == "code")
    assert base64.b64decode(outputs(last, "image/png")[0]) == PICTURE.read_bytes()
    assert (
        f"]({PICTURE.relative_to(EXAMPLES.parent)})" in (EXAMPLES.parent / "README.md").read_text()
    )


@pytest.mark.parametrize("name", REAL_MODELS)
def test_notebook_names_the_line_to_change(name: str) -> None:
    notebook = read(name)
    loads = "\n".join(sources(notebook, "code")).count('load("demo")')
    prose = "\n".join(sources(notebook, "markdown"))
    assert loads == len(REAL_MODELS[name])
    assert all(f'`load("{model}")`' in prose for model in REAL_MODELS[name])


@pytest.mark.parametrize("name", REAL_MODELS)
def test_stored_outputs_are_up_to_date(name: str, fonts: None, tmp_path: Path) -> None:
    """Run the cells as one program, which must print what is stored.

    To store new outputs: jupyter nbconvert --to notebook --execute --inplace examples/*.ipynb
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    env |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "MLX_MOBILECLIP_CACHE": str(tmp_path)}
    env["PYTHONPATH"] = str(EXAMPLES.parent)
    notebook = read(name)
    command = [sys.executable, "-c", "\n".join(sources(notebook, "code"))]
    result = subprocess.run(command, cwd=EXAMPLES, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert result.stdout == "".join(text for cell in code for text in outputs(cell, "stream"))
