"""`classify`: labels, templates and both forms of output."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from standin import paint

from mlx_mobileclip.__main__ import main

pytestmark = pytest.mark.usefixtures("loaded")


def test_labels_are_ranked_in_a_table(
    images: Path, capsys: pytest.CaptureFixture[str], loaded: list[Any]
) -> None:
    args = ["classify", "--image", f"{images}/red.png", "--labels", "blue, red ,green,"]
    assert main([*args, "--model", "org/m", "--revision", "r", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert out.startswith("100.0 %")
    assert out.splitlines()[0].split()[-1] == "red"
    assert "loaded org/m" in err
    options = {"variant": None, "revision": "r", "dtype": "float32"}
    assert loaded == [(("org/m",), options | {"config": None, "preprocess": None})]


def test_json_and_several_images(
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


def test_imagenet_uses_the_published_templates(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["classify", "--imagenet", "--image", f"{images}/red.png", "--json", "--quiet"]
    assert main([*args, "--templates", "simple"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["templates"]) == 7
    assert main(args) == 0
    assert len(json.loads(capsys.readouterr().out)["templates"]) == 80


def test_template_without_placeholder_is_refused(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["classify", "--image", f"{images}/red.png", "--labels", "a", "--quiet"]
    assert main([*args, "--template", "a photo"]) == 1
    assert "has no {}" in capsys.readouterr().err


def test_labels_with_commas(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["classify", "--image", f"{images}/red.png", "--quiet", "--format", "jsonl"]
    assert main([*args, "--label", "a red, round thing", "--label", " blue "]) == 0
    best = json.loads(capsys.readouterr().out)["predictions"]
    assert [p["label"] for p in best] == ["a red, round thing", "blue"]
    assert main([*args, "--label", " "]) == 1
    assert "no labels" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["directory", "glob", "list"])
def test_unreadable_image_among_many_is_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (images / "broken.png").write_bytes(b"x")
    (images / "notes.txt").touch()
    lines = "".join(f"{path}\n" for path in sorted(images.glob("*.png")))
    (tmp_path / "list.txt").write_text(lines)
    source = {"directory": images, "glob": f"{images}/*.png", "list": tmp_path / "list.txt"}[kind]
    args = ["classify", "--image", str(source), "--labels", "red,green,blue", "--quiet"]
    args += ["--top-k", "2", "--batch-size", "2"]
    for output in ("table", "json", "jsonl", "csv"):
        assert main([*args, "--format", output]) == 1
        out, err = capsys.readouterr()
        messages = err.splitlines()
        if kind == "directory":
            assert messages.pop(0) == "ignored 1: 1 .txt"
        assert (
            len(messages) == 2
            and messages[0].startswith("skipped ")
            and "broken.png" in messages[0]
        )
        assert "classified 3 of 4 images; skipped the 1 named above" in messages[1]
        if output == "table":
            found = [line.split()[-1] for line in out.splitlines()[1::3]]
        elif output == "csv":
            rows = list(csv.DictReader(io.StringIO(out)))
            assert [row["rank"] for row in rows] == ["1", "2"] * 3
            assert 0 < float(rows[0]["probability"]) <= 1
            found = [row["label"] for row in rows[::2]]
        else:
            report = json.loads(out)["results"] if output == "json" else None
            items = report or [json.loads(line) for line in out.splitlines()]
            found = [item["predictions"][0]["label"] for item in items]
            assert found == [Path(item["image"]).stem for item in items]
        assert found == ["blue", "green", "red"]


def test_csv_and_json_lines_of_odd_names(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = images / os.fsdecode(b"a,\n\x1b[2J\xff.png")
    (images / "red.png").rename(odd)
    args = ["classify", "--image", str(odd), "--label", 'a "red", one', "--quiet", "--format"]
    assert main([*args, "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["image"] == str(odd).replace("\udcff", "\\udcff")
    assert row["label"] == 'a "red", one'
    assert main([*args, "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == str(odd)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main([*args, "csv"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_nothing_to_classify_is_an_error(
    images: Path, capsys: pytest.CaptureFixture[str], loaded: list[Any]
) -> None:
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(b"x")
    args = ["classify", "--labels", "red", "--quiet", "--image"]
    assert main([*args, f"{images}/a.png", "--image", f"{images}/b.png"]) == 1
    assert "none of the 2 images could be classified" in capsys.readouterr().err
    loaded.clear()
    for image in (f"{images}/a.png", "", "none.png", f"{images}/*.jpg"):
        assert main([*args, image]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert loaded == []


def test_image_without_a_suffix_is_read(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(images / "x.png", "red")
    (images / "x.png").rename(images / "photo")
    assert main(["classify", "--labels", "red,blue", "--image", f"{images}/photo", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("red")


def test_labels_must_be_utf8(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loaded: list[Any]
) -> None:
    args = ["classify", "--image", f"{images}/red.png", "--quiet"]
    (tmp_path / "labels.txt").write_bytes("red\ncafé\n".encode("latin-1"))
    assert main([*args, "--labels-file", f"{tmp_path}/labels.txt"]) == 1
    assert "labels.txt: line 2 is not UTF-8" in capsys.readouterr().err
    assert loaded == []
    assert main([*args, "--labels", "red,caf\udce9"]) == 1
    assert "not UTF-8 text" in capsys.readouterr().err
