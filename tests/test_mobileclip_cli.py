"""The command line of mlx_mobileclip: what goes where, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import standin
from standin import COLOURS, StandIn, StandInProcessor, paint

import mlx_mobileclip
from mlx_mobileclip import evaluate
from mlx_mobileclip.__main__ import main
from mlx_mobileclip.embed import find_images

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The stand-in for whatever is loaded; what `load` was asked for."""
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return standin.load()

    monkeypatch.setattr(mlx_mobileclip, "load", load, raising=False)
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "cache"))
    return asked


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for i, colour in enumerate(COLOURS):
        paint(root / f"{colour}.png", colour, seed=i)
    return root


def run_in_shell(*args: str, **options: Any) -> subprocess.Popen[str]:
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import mlx_mobileclip, standin\n"
        "mlx_mobileclip.load = standin.load\n"
        "from mlx_mobileclip.__main__ import main; sys.exit(main())\n"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, str(HERE), *args],
        **{"stdout": pipe, "stderr": pipe, "text": True} | options,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "STANDIN_SECONDS": "0.1"},
    )


# classify


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


def test_errors_are_one_line_and_told_before_the_model_is_loaded(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loaded: list[Any]
) -> None:
    red = f"{images}/red.png"
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "there.npz").write_text("")
    for args, match in (
        (["classify", "--image", "none.png", "--labels", "a"], "no such file"),
        (["classify", "--image", red, "--labels", " , "], "no labels"),
        (["classify", "--image", red, "--labels-file", "none.txt"], "cannot be read"),
        (["classify", "--image", red, "--labels-file", f"{tmp_path}/empty.txt"], "no labels"),
        (["classify", "--image", red, "--labels", "a", "--top-k", "0"], "at least 1"),
        (["embed", "--images", "none", "--output", f"{tmp_path}/x.npz"], "no such file"),
        (["embed", "--images", red, "--output", f"{tmp_path}/x.csv"], "must end in"),
        (["embed", "--images", red, "--output", f"{tmp_path}/there.npz"], "already exists"),
        (["embed", "--texts", "none.txt", "--output", f"{tmp_path}/x.npz"], "cannot be read"),
        (["evaluate", "--imagenet", str(images)], "instead of 1000"),
        (["embed", "--images", "~nobodyx", "--output", f"{tmp_path}/x.npz"], "no such file"),
        (["evaluate", "--captions", "none.json"], "needs --images"),
        (["evaluate", "--captions", "x", "--images", "x", "--template", "{}"], "no --template"),
        (["evaluate", "--captions", "x", "--images", "x", "--templates", "openai"], "--templates"),
        (["evaluate", "--imagenet", "x", "--images", "x"], "no --images"),
        (["evaluate", "--captions", "none.json", "--images", "x"], "cannot be read"),
    ):
        assert main(args) == 1, args
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert match in err
    assert loaded == []


def test_template_without_a_place(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["classify", "--image", f"{images}/red.png", "--labels", "a", "--quiet"]
    assert main([*args, "--template", "a photo"]) == 1
    assert "has no {}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["paint"],
        ["classify", "--labels", "a"],
        ["classify", "--image", "x.png"],
        ["classify", "--image", "x.png", "--labels", "a", "--imagenet"],
        ["classify", "--image", "x", "--labels", "a", "--template", "{}", "--templates", "simple"],
        ["embed", "--images", "x"],
        ["embed", "--images", "x", "--texts", "y", "--output", "z.npz"],
        ["embed", "--images", "x", "--output", "z.npz", "--batch-size", "many"],
        ["evaluate"],
    ],
)
def test_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_debug_shows_the_traceback(images: Path) -> None:
    with pytest.raises(mlx_mobileclip.ImageError):
        main(["classify", "--image", "none.png", "--labels", "a", "--debug"])


# embed


def test_embed_images(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.npz"
    assert main(["embed", "--images", str(images), "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "embedded 3 of 3 images" in err
    assert "\x1b" not in err
    with np.load(output) as data:
        assert json.loads(data["names"].tobytes()) == find_images(str(images))
        assert data["model"] == "apple/MobileCLIP2-S0"


def test_embed_says_what_it_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.jpg").write_bytes(b"\xff\xd8")
    args = ["embed", "--images", f"{images}/r*.png", str(images), "--output", f"{tmp_path}/x.npz"]
    assert main([*args, "--quiet", "--batch-size", "2"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert err[0].startswith("skipped ") and "broken.jpg" in err[0]
    assert "embedded 4 of 5 images" in err[1] and "skipped the 1" in err[1]
    with np.load(tmp_path / "x.npz") as data:
        assert len(json.loads(data["names"].tobytes())) == 4


def test_embed_says_which_directories_it_could_not_read(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (images / "locked").mkdir()
    scandir = os.scandir

    def guarded(path: Any = ".") -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # chmod does not keep root out
    args = ["embed", "--images", str(images), str(images), "--output", f"{tmp_path}/x.npz"]
    assert main([*args, "--quiet"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0] == f"skipped {images}/locked: cannot be read (Permission denied)"
    assert len(err) == 2
    assert "embedded 6 of 6 images" in err[1] and "skipped the 1" in err[1]
    for source, on_skip in ((images, None), (images / "locked", lambda *_: None)):
        with pytest.raises(mlx_mobileclip.ModelError, match="locked: cannot be read"):
            find_images(str(source), on_skip)


def test_names_that_do_not_fit_are_told_before_the_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[Any],
) -> None:
    monkeypatch.setattr("mlx_mobileclip.embed.MAX_NAMES_BYTES", 30)
    (tmp_path / "t.txt").write_text('""""""""\n')  # 8, escaped twice 32
    args = ["embed", "--texts", f"{tmp_path}/t.txt", "--output"]
    assert main([*args, f"{tmp_path}/x.safetensors"]) == 1
    assert "write .npz instead" in capsys.readouterr().err
    assert loaded == []
    assert main([*args, f"{tmp_path}/x.npz"]) == 0


def test_embed_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("a red bus\na blue one\n")
    args = ["embed", "--texts", f"{tmp_path}/t.txt", "--output", f"{tmp_path}/x.safetensors"]
    assert main(args) == 0
    assert "embedded 2 of 2 texts" in capsys.readouterr().err


def test_progress_bar_on_a_terminal(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("mlx_mobileclip.command.REDRAW_SECONDS", 0)
    args = ["embed", "--images", str(images), "--output", f"{tmp_path}/x.npz", "--batch-size", "1"]
    assert main(args) == 0
    err = capsys.readouterr().err
    assert "3 of 3 images" in err
    assert "/s, 0:0" in err
    assert "[########" in err


def test_plain_progress_lines_elsewhere(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_mobileclip.command.LINE_SECONDS", 0)
    args = ["embed", "--images", str(images), "--output", f"{tmp_path}/x.npz", "--batch-size", "1"]
    assert main(args) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" images")[0] for line in lines[1:4]] == ["1 of 3", "2 of 3", "3 of 3"]


def test_ctrl_c_is_130_and_resumes(images: Path, tmp_path: Path) -> None:
    import signal

    for i in range(30):
        paint(images / f"{i:02}.png", "red", seed=i)
    output = tmp_path / "x.npz"
    args = ["embed", "--images", str(images), "--output", str(output), "--batch-size", "1"]
    process = run_in_shell(*args)
    partial = tmp_path / "x.npz.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 700):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert out == ""
    assert "run the same command again" in err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not output.exists()
    assert main(args) == 0
    assert not partial.exists()


def test_closed_pipe(images: Path) -> None:
    args = ["--image", f"{images}/red.png", "--labels", "red,green,blue", "--quiet"]
    process = run_in_shell("classify", *args)
    assert process.stdout and process.stderr
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 130
    assert err == ""


def test_warnings_are_one_line(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    class Long(StandInProcessor):
        def texts(self, texts: list[str]) -> mx.array:
            warnings.warn("a text is\x1b[2J cut", stacklevel=2)
            return super().texts(texts)

    monkeypatch.setattr(mlx_mobileclip, "load", lambda *_, **__: (StandIn(), Long()))
    args = ["classify", "--image", f"{images}/red.png", "--labels", "red", "--quiet"]
    assert main(args) == 0
    assert set(capsys.readouterr().err.splitlines()) == {"warning: a text is[2J cut"}


# evaluate


def test_evaluate_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ("red", "green", "blue")
    for module in (evaluate, "mlx_mobileclip.zeroshot"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.imagenet_classes", lambda: classes)
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


def test_numbered_classes_are_in_the_order_of_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "imagenet_classes", lambda: ("class",) * 12)
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.png").touch()
    paths, targets = evaluate.imagenet_images(tmp_path)
    assert [int(Path(path).parent.name) for path in paths] == targets == list(range(12))


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


def test_retrieval_without_a_text_tower_embeds_no_image(images: Path) -> None:
    model = StandIn()
    model.text = None
    with pytest.raises(mlx_mobileclip.ModelError, match="image tower only"):
        evaluate.evaluate_retrieval(model, StandInProcessor(), [f"{images}/red.png"], ["red"], [0])
    assert model.image_batches == []
