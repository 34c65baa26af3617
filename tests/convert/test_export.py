"""`convert --layout`: checkpoints for other runtimes, without loss."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import synthetic
from world import HELD_OUT, render, scene

from convert import __main__ as command
from convert import pipeline
from convert.export.runtimes import TARGETS
from mlx_fastvlm import generate, load
from mlx_mobileclip.checkpoints.safetensors import read_tensors
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.json_fields import read_json

EXAMPLES = Path(__file__).parents[2] / "examples"  # four pictures

QUESTIONS = ("How many shapes are there?", "Describe the image.")
TIED, UNTIED = "tied", "differs"


def convert(source: Path | str, target: Path, *options: str) -> None:
    arguments = ["--model", str(source), "--mlx-path", str(target), "--dtype", "float32"]
    assert command.main([*arguments, "--verify", *options]) == 0


def answers(path: Path | str) -> list[list[int]]:
    model, processor = load(path, dtype="float32")
    image = render(scene(HELD_OUT))
    return [
        generate(model, processor, question, image, max_tokens=24).token_ids
        for question in QUESTIONS
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_demo_survives_a_round_trip(target: str, tmp_path: Path) -> None:
    """The same tensors to the last bit, the same image size, the same answers."""
    convert("demo", tmp_path / "there", "--layout", target)
    convert(tmp_path / "there", tmp_path / "back")
    (ours, _), (theirs, _) = load(tmp_path / "back", dtype="float32"), load("demo", dtype="float32")
    assert ours.config.image_size == theirs.config.image_size == 384
    rows = theirs.config.text.vocab_size
    there, here = named_parameters(ours), named_parameters(theirs)
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        assert mx.array_equal(there[name][:rows] if "embed" in name else there[name], tensor), name
    assert answers(tmp_path / "there") == answers("demo")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", [TIED, UNTIED])
def test_names_are_those_of_real_checkpoints(head: str, target: str, tmp_path: Path) -> None:
    """Apple's names, renamed by the tests' own tables, are the names that are written."""
    tensors = synthetic.apple_tensors("tiny", lm_head=head)
    config = synthetic.apple_config("tiny", tie_word_embeddings=head == TIED)
    source = synthetic.write(tmp_path / "source", tensors, config)
    convert(source, tmp_path / "there", "--layout", target)
    rename = synthetic.mlx_vlm_name if target == "mlx-vlm" else synthetic.transformers_name
    expected = synthetic.renamed(tensors, rename)
    if head == TIED:
        expected = {name: value for name, value in expected.items() if "lm_head" not in name}
    written = read_tensors(tmp_path / "there")
    # Folding leaves no step counters and no classification head behind.
    unused = (".num_batches_tracked", "head.proj")
    written = {name: value for name, value in written.items() if not name.endswith(unused)}
    assert written.keys() == {name for name in expected if not name.endswith(unused)}
    if target == "mlx-vlm":
        expected = {name: synthetic.mlx_layout(name, value) for name, value in expected.items()}
    for name, value in written.items():
        rows = len(expected[name])  # the vocabulary may have more rows, for the image's id
        assert value[:rows].shape == expected[name].shape, name
    assert bool(read_json(tmp_path / "there" / "config.json")["tie_word_embeddings"]) == (
        head == TIED
    )


@pytest.mark.parametrize(
    "options",
    [(), ("--q-mixed", "--calibration", str(EXAMPLES)), ("--q-mode", "mxfp4")],
    ids=["uniform", "mixed", "mxfp4"],
)
def test_quantized_layers_for_mlx_vlm(options: tuple[str, ...], tmp_path: Path) -> None:
    """Fused layers are quantised, then split, as if each part were quantised alone."""
    quantise = ["-q", "--q-parts", "decoder", "projector", *options]
    convert("demo", tmp_path / "quantized", *quantise)
    convert(tmp_path / "quantized", tmp_path / "there", "--layout", "mlx-vlm")
    entry = read_json(tmp_path / "there" / "config.json")["quantization"]
    written = read_tensors(tmp_path / "there")
    quantized = {name.removesuffix(".scales") for name in written if name.endswith(".scales")}
    assert quantized == {name for name, value in entry.items() if isinstance(value, dict)}
    assert "language_model.model.layers.0.self_attn.k_proj" in quantized
    assert answers(tmp_path / "there") == answers(tmp_path / "quantized")


def test_files_that_other_runtimes_need(tmp_path: Path) -> None:
    for target in TARGETS:
        convert("demo", tmp_path / target, "--layout", target)
        assert "<|im_start|>assistant\n" in (tmp_path / target / "chat_template.jinja").read_text()
        assert read_json(tmp_path / target / "tokenizer_config.json")["eos_token"] == "<|im_end|>"
        ends = [567, 565]  # <|im_end|>, <|endoftext|>
        generation = read_json(tmp_path / target / "generation_config.json")
        assert generation["eos_token_id"] == ends and generation["pad_token_id"] == ends[1]
        config = read_json(tmp_path / target / "config.json")
        assert config.get("text_config", config)["eos_token_id"] == ends  # mlx-vlm: at the top
        pixels = read_json(tmp_path / target / "preprocessor_config.json")
        assert pixels["crop_size"] == {"height": 384, "width": 384} and pixels["do_pad"]
    tokenizer = json.loads((tmp_path / "transformers" / "tokenizer.json").read_text())
    config = read_json(tmp_path / "transformers" / "config.json")
    (image,) = [t for t in tokenizer["added_tokens"] if t["content"] == "<image>"]
    assert image["id"] == config["image_token_index"] < config["text_config"]["vocab_size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--layout", "transformers", "-q"),
            "transformers cannot load weights quantised by MLX",
        ),
        (("--layout", "transformers", "-q", "--q-mixed"), "leave out -q, or --dequantize"),
        (
            ("--layout", "mlx-vlm", "-q", "--q-parts", "vision"),
            "cannot load a quantised image tower",
        ),
    ],
)
def test_unsupported_exports_are_refused(
    options: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is measured, which takes long."""
    monkeypatch.delattr(pipeline, "sensitivities")
    base = ["--model", "demo", "--mlx-path", str(tmp_path / "out")]
    assert command.main([*base, *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mlx_vlm_refuses_cropping_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mlx-vlm pads every image, so a checkpoint that crops would give other answers."""
    source = synthetic.write_layout(tmp_path / "source", "llava_qwen2")
    config = read_json(source / "config.json") | {"image_aspect_ratio": "square"}
    (source / "config.json").write_text(json.dumps(config))
    base = ["--model", str(tmp_path / "source"), "--mlx-path", str(tmp_path / "out")]
    assert command.main([*base, "--layout", "mlx-vlm"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mlx-vlm" in line]
    assert "has image mode 'crop'" in line
    assert command.main([*base, "--layout", "transformers", "--quiet"]) == 0
