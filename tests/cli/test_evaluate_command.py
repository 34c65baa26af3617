"""`evaluate`: results on small data sets with known answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from standin import paint

from mlx_mobileclip.__main__ import main
from mlx_mobileclip.eval import zero_shot

IDS = ("n01440764", "n01443537", "n01484850")
pytestmark = pytest.mark.usefixtures("loaded")


@pytest.fixture
def validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes; the third holds one image of its class and one that is not."""
    labels = ("red", "green", "blue")
    monkeypatch.setattr(zero_shot, "imagenet_classes", lambda: labels)
    for i, (folder, colour) in enumerate(
        ((IDS[0], "red"), (IDS[1], "green"), (IDS[2], "blue"), (IDS[2], "red"))
    ):
        (tmp_path / "val" / folder).mkdir(parents=True, exist_ok=True)
        paint(tmp_path / "val" / folder / f"{i}.png", colour, seed=i)
    return tmp_path / "val"


def test_evaluate_imagenet(validation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--imagenet", str(validation), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    expected = {"model": "apple/MobileCLIP2-S0", "images": 4, "top1": 75.0, "top5": 100.0}
    assert (json.loads(out), err) == (expected, "")
    (validation / IDS[0] / "bad.png").write_bytes(b"")
    assert main(["evaluate", "--imagenet", str(validation), "--quiet"]) == 1
    assert "would not be comparable" in capsys.readouterr().err


def test_subset_is_ranked_among_all_labels(
    validation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (validation / IDS[0]).rename(validation.parent / "elsewhere")
    args = ["evaluate", "--imagenet", str(validation), "--quiet"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert err == "2 of 3 classes have images; all 3 are candidates\n"
    assert out.splitlines() == [
        "classes: 2",
        "labels: 3",
        "images: 3",
        "top1: 66.67",
        "top5: 100.00",
    ]


def test_custom_classes_from_folders(validation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, label in zip(IDS, ("red", "green", "blue"), strict=True):
        (validation / name).rename(validation / label)
    args = ["evaluate", "--imagenet", str(validation), "--quiet", "--json"]
    assert main(args) == 1
    assert "not an ImageNet class" in capsys.readouterr().err
    assert main([*args, "--classes-from-folders"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["classes"], report["labels"], report["top1"]) == (3, 3, 75.0)


def test_evaluate_retrieval(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def entry(file: str, colour: str, split: str = "test", **more: str) -> dict[str, Any]:
        sentences = [{"raw": f"a {colour} thing, caption {i}"} for i in range(7)]
        return {"filename": f"{file}.png", "split": split, "sentences": sentences, **more}

    captions = tmp_path / "dataset.json"
    args = ["evaluate", "--captions", str(captions), "--images", str(images), "--quiet"]
    entries = [entry("red", "red"), entry("green", "green", filepath="val2014")]
    entries += [entry("none", "red", "train"), entry("blue", "blue")]
    captions.write_text(json.dumps({"images": entries}))
    assert main([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["captions"]) == (3, 15)
    figures = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert [report[figure] for figure in figures] == [100] * 6
    # Two images with each other's captions.
    entries[:2] = [entry("red", "green"), entry("green", "red")]
    captions.write_text(json.dumps({"images": entries}))
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "image_to_text_r1: 33.33\nimage_to_text_r5: 33.33" in out
    assert "text_to_image_r1: 33.33\ntext_to_image_r5: 100.00" in out
    for data, match in (
        ("[", "not in Karpathy's format"),
        ("{}", "not in Karpathy's format"),
        ('{"images": [3]}', "not in Karpathy's format"),
        ('{"images": []}', "no test split"),
        (json.dumps({"images": [{**entries[0], "filename": "x.png"}]}), "x.png is missing"),
    ):
        captions.write_text(data)
        assert main(args) == 1
        assert match in capsys.readouterr().err
