"""`evaluate`: results on small data sets with known answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from standin import paint

from mlx_mobileclip.__main__ import main
from mlx_mobileclip.eval import datasets, zero_shot

pytestmark = pytest.mark.usefixtures("loaded")


def test_evaluate_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ("red", "green", "blue")
    for module in (datasets, zero_shot):
        monkeypatch.setattr(module, "imagenet_classes", lambda: classes)
    # The third directory holds one image of its class and one that is not.
    for i, (folder, colour) in enumerate(
        (("n01", "red"), ("n02", "green"), ("n03", "blue"), ("n03", "red"))
    ):
        (tmp_path / "val" / folder).mkdir(parents=True, exist_ok=True)
        paint(tmp_path / "val" / folder / f"{i}.png", colour, seed=i)
    assert main(["evaluate", "--imagenet", f"{tmp_path}/val", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"model": "apple/MobileCLIP2-S0", "images": 4, "top1": 75.0, "top5": 100.0}
    (tmp_path / "val" / "n01" / "bad.png").write_bytes(b"")
    assert main(["evaluate", "--imagenet", f"{tmp_path}/val", "--quiet"]) == 1
    assert "would not be comparable" in capsys.readouterr().err


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
        ("[", "not Karpathy's form"),
        ("{}", "not Karpathy's form"),
        ('{"images": [3]}', "not Karpathy's form"),
        ('{"images": []}', "no test split"),
        (json.dumps({"images": [{**entries[0], "filename": "x.png"}]}), "x.png is missing"),
    ):
        captions.write_text(data)
        assert main(args) == 1
        assert match in capsys.readouterr().err
