"""`python -m convert` and `convert(...)`: the written files, and writing all or nothing."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
from tolerances import relative_error

import mlx_mobileclip
from convert import ConvertOptions, pipeline
from convert import __main__ as command
from convert import convert as convert_in_python
from convert.write import new_directory, write_tensors
from mlx_fastvlm import CheckpointError, ConfigError, load
from mlx_mobileclip.checkpoints.safetensors import read_tensors, tensor_files
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.models.clip import PreprocessConfig

EXAMPLES = Path(__file__).parents[2] / "examples"  # four pictures


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = synthetic.write_layout(tmp_path / "source", "llava_qwen2", split_tokenizer=True)
    (path / "LICENSE").write_text("research only")
    (path / "evil.py").write_text("raise SystemExit('ran')")
    return path


def convert(source: Path, target: Path, *options: str) -> int:
    return command.main(["--model", str(source), "--mlx-path", str(target), *options])


def test_converted_checkpoint_is_the_same_model(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert convert(source, target, "--dtype", "float32") == 0
    assert sorted(p.name for p in target.iterdir()) == [
        "LICENSE", "NOTICE", "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    ours, processor = load(target)
    theirs, their_processor = load(source)
    ours, theirs = named_parameters(ours), named_parameters(theirs)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    text = "the <|im_end|> thin\n\ncafé"
    assert processor.tokenizer.encode(text) == their_processor.tokenizer.encode(text)
    assert processor.tokenizer.added == their_processor.tokenizer.added
    config = json.loads((target / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["source"] == {"model": str(source), "revision": None, "layout": "llava_qwen2"}
    assert "research purposes only" in (target / "NOTICE").read_text()


def test_converting_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "one", "--dtype", "float16") == 0
    assert convert(tmp_path / "one", tmp_path / "two", "--dtype", "float16") == 0
    files = ("model.safetensors", "tokenizer.json", "config.json")
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [("--q-bits", "8", "--q-group-size", "32"), ("--q-group-size", "32"), ("--q-mode", "mxfp4")],
)
def test_quantized_checkpoint_loads(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert convert(source, tmp_path / "q", "-q", "--dtype", "float32", *options) == 0
    model, processor = load(tmp_path / "q")
    assert model.config.quantization.keys() >= {"language_model.embed_tokens"}
    inputs = processor("the", [np.full((9, 9, 3), 50, np.uint8)])
    assert mx.isfinite(model(inputs.input_ids[None], pixels=inputs.pixels)).all().item()


def test_eight_bits_are_close_to_the_original(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "q", "-q", "--q-bits", "8", "--q-group-size", "32") == 0
    model, processor = load(tmp_path / "q")
    reference, _ = load(source)
    ids = processor("in the end").input_ids[None]
    assert relative_error(model(ids), reference(ids)) < 5e-2


def test_bad_quantization_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "q", "-q", "--q-bits", "7") == 1
    assert "7 is not one of" in capsys.readouterr().err
    assert convert(source, tmp_path / "q", "-q", "--q-group-size", "128") == 1
    assert "is a multiple of 128 wide" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_quantization_options_need_q(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "q", "--q-bits", "8") == 1
    assert "need -q; add it" in capsys.readouterr().err


def test_shards_are_read_back(tmp_path: Path) -> None:
    tensors = {f"t{i}": mx.full((10,), i, mx.float32) for i in range(7)}
    write_tensors(tmp_path, dict(tensors), shard_bytes=100)
    assert len(tensor_files(tmp_path)) == 4
    back = read_tensors(tmp_path)
    assert back.keys() == tensors.keys()
    assert all(mx.array_equal(back[name], tensors[name]).item() for name in tensors)


def test_existing_target_is_kept(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    assert convert(source, target) == 1
    assert "already exists" in capsys.readouterr().err
    assert [p.name for p in target.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised, new_directory(tmp_path / "out") as directory:
        (directory / "config.json").touch()
        raise error
    assert expected is KeyboardInterrupt or "No space left" in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["touched", "truncated", "removed"])
def test_source_changed_meanwhile_is_an_error(
    change: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Change the file after its shapes have been read, as an unfinished download would."""
    weights = source / "model.safetensors"

    def late(*arguments: Any) -> None:
        if change == "touched":
            os.utime(weights, ns=(1, 1))
        elif change == "truncated":
            os.truncate(weights, weights.stat().st_size // 2)
        else:
            weights.unlink()
        write_tensors(*arguments)

    monkeypatch.setattr(pipeline, "write_tensors", late)
    assert convert(source, tmp_path / "out", "--verify") == 1
    message = "model.safetensors was changed while it was read; convert again"
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_killed_conversion_can_be_run_again(source: Path, tmp_path: Path) -> None:
    """Killed between the tensors and the rename; the target appears only when complete."""
    target = tmp_path / "out"
    code = (
        "import sys, time; from convert import __main__ as c\n"
        "from mlx_fastvlm.preprocess.tokenizer import Tokenizer\n"
        "Tokenizer.save = lambda *_: (print('half', flush=True), time.sleep(60))\n"
        f"c.main(['--model', {str(source)!r}, '--mlx-path', {str(target)!r}])"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    time.sleep(0.05)
    assert not target.exists()
    assert convert(source, target) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


# The Python function.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16", "verify": True},
        {"layout": "mlx-vlm"},
        {"quantize": True, "q_bits": 8, "q_group_size": 32, "q_parts": ["decoder", "vision"]},
        {"quantize": True, "q_group_size": 32, "max_size": "1MB", "calibration": EXAMPLES},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_function_and_command_write_the_same_files(
    options: dict[str, Any], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte by byte, the command in the model card included."""
    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    convert_in_python(source, one, quiet=True, **options)
    assert capsys.readouterr() == ("", "")
    arguments = ConvertOptions(source, two, quiet=True, **options).command_line()
    assert command.main(arguments) == 0
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert files == {path.name: path.read_bytes() for path in two.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert b"python -m convert --model source --mlx-path out --" in files["README.md"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_bits": 8}, "need -q"),
        ({"q_mixed": True}, "need -q"),
        ({"max_size": "4MB"}, "need -q"),
        ({"calibration": "pictures"}, "need -q"),
        ({"quantize": True, "dequantize": True}, "are opposites"),
        ({"quantize": True, "q_mixed": True, "q_mode": "mxfp4"}, "mxfp4 has a fixed number"),
        ({"quantize": True, "max_size": "4 shoes"}, "is not a size"),
        ({"quantize": True, "q_mode": "int4"}, "int4"),
        ({"quantize": True, "q_parts": ["image"]}, "no part is called 'image'"),
        ({"dtype": "float64"}, "'float64' is not one of"),
        ({"layout": "ollama"}, "'ollama' is not one of mlx-vlm, transformers"),
        ({"variant": "MobileCLIP-S0", "layout": "mlx-vlm"}, "--layout is for FastVLM"),
        ({"config": "c.json"}, "--config is for MobileCLIP"),
    ],
    ids=str,
)
def test_contradicting_options_are_refused(
    options: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_in_python(source, tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_preprocess_option(tmp_path: Path) -> None:
    """On the command line, in Python, and in the command that the model card shows."""
    stated = PreprocessConfig(192, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    source = Path(mlx_mobileclip.__file__).parent / "demo"
    one, two = tmp_path / "one", tmp_path / "two"
    convert_in_python(source, one, preprocess=stated, quiet=True)
    options = ConvertOptions(str(source), two, preprocess=stated, quiet=True)
    assert command.main(options.command_line()) == 0
    for path in (one, two):
        assert mlx_mobileclip.load(path)[0].config.preprocess == stated


def test_command_and_function_have_the_same_options() -> None:
    def parameters(function: Any) -> dict[str, Any]:
        return {p.name: p.default for p in inspect.signature(function).parameters.values()}

    options = parameters(ConvertOptions)
    assert parameters(convert_in_python) == options
    defaults = {a.dest: a.default for a in command.build_parser()._actions}
    defaults = {name: defaults.get(name, "none") for name in options}
    required = {"model": inspect.Parameter.empty, "mlx_path": inspect.Parameter.empty}
    assert defaults | required == options


def test_installed_package_is_part_of_mlx_fastvlm(source: Path, tmp_path: Path) -> None:
    """The wheel has the folder as `mlx_fastvlm.convert`; here a link takes its place."""
    root = Path(__file__).parents[2]
    package = tmp_path / "site" / "mlx_fastvlm"
    package.mkdir(parents=True)
    for path in (root / "mlx_fastvlm").iterdir():
        (package / path.name).symlink_to(path)
    (package / "convert").symlink_to(root / "convert")
    (package.parent / "mlx_mobileclip").symlink_to(root / "mlx_mobileclip")
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command_line = ["--model", str(source), "--mlx-path", str(tmp_path / "out"), "--quiet"]
    code = "from mlx_fastvlm.convert import convert; convert({!r}, {!r}, quiet=True)"
    code = code.format(str(source), str(tmp_path / "two" / "out"))
    for arguments in (["-m", "mlx_fastvlm.convert", *command_line], ["-c", code]):
        subprocess.run(
            [sys.executable, *arguments], check=True, cwd=tmp_path, env=environment, timeout=60
        )
    files = [(path / "out" / "model.safetensors") for path in (tmp_path, tmp_path / "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
