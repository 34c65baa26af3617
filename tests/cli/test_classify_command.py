"""`classify`: labels, templates and both forms of output."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_mobileclip.__main__ import main

pytestmark = pytest.mark.usefixtures("loaded")


def test_classify(images: Path, capsys: pytest.CaptureFixture[str], loaded: list[Any]) -> None:
    args = ["classify", "--image", f"{images}/red.png", "--labels", "blue, red ,green,"]
    assert main([*args, "--model", "org/m", "--revision", "r", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert out.startswith("100.0 %")
    assert out.splitlines()[0].split()[-1] == "red"
    assert "loaded org/m" in err
    assert loaded == [(("org/m",), {"variant": None, "revision": "r", "dtype": "float32"})]


def test_classify_json_and_several_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a red, round thing\n\ngreen\nblue\n")
    args = ["classify", "--labels-file", str(labels), "--quiet", "--top-k", "2"]
    args += ["--image", f"{images}/red.png", "--image", f"{images}/blue.png"]
    assert main([*args, "--json", "--template", "a {}", "--template", "{}!"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert report["templates"] == ["a {}", "{}!"]
    assert [Path(r["image"]).name for r in report["results"]] == ["red.png", "blue.png"]
    best = report["results"][0]["predictions"]
    assert len(best) == 2
    assert best[0]["label"] == "a red, round thing"
    assert best[0].keys() == {"label", "index", "probability", "similarity"}
    assert report["results"][1]["predictions"][0]["index"] == 2
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{images}/red.png"
    assert lines[3] == f"{images}/blue.png"


def test_imagenet_takes_the_published_templates(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["classify", "--imagenet", "--image", f"{images}/red.png", "--json", "--quiet"]
    assert main([*args, "--templates", "simple"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["templates"]) == 7
    assert main(args) == 0
    assert len(json.loads(capsys.readouterr().out)["templates"]) == 80


def test_template_without_a_place(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["classify", "--image", f"{images}/red.png", "--labels", "a", "--quiet"]
    assert main([*args, "--template", "a photo"]) == 1
    assert "has no {}" in capsys.readouterr().err
