"""`convert --verify`, and the report on every tensor of a source."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import synthetic
import synthetic_clip
from synthetic_clip import tiny_config, tiny_shapes, values
from tensor_report import UnaccountedError, report_fastvlm, report_mobileclip
from tolerances import BATCHED, relative_error

from convert import __main__ as command
from convert import pipeline
from convert.calibration import LABELS, calibration_samples
from convert.quantize.stored import as_stored
from convert.verify.compare import check_errors, stage_errors
from convert.verify.stages import IMAGES, TEXTS, Read, run_fastvlm, run_mobileclip
from convert.write import write_tensors
from mlx_fastvlm.loader import find_checkpoint
from mlx_fastvlm.loader import load as load_fastvlm
from mlx_fastvlm.loader import read_canonical as read_fastvlm
from mlx_mobileclip import CheckpointError, load
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.checkpoints.hub import Checkpoint
from mlx_mobileclip.checkpoints.safetensors import read_tensors
from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.loader import read_canonical as read_mobileclip
from mlx_mobileclip.models.variants import VARIANTS

# Variant, layout, fused branches or not, and the number of tensors that are canonical ones bit by
# bit: every kind of tower in every layout in which it is published.
CLIPS = [
    ("MobileCLIP-S0", "apple", True, 75),
    ("MobileCLIP-S0", "apple", False, 43),
    ("MobileCLIP-B", "apple", False, 61),
    ("MobileCLIP-S2", "open_clip", True, 76),
    ("MobileCLIP2-S3", "open_clip", False, 42),
    ("MobileCLIP2-B", "open_clip", False, 62),
    ("MobileCLIP2-L-14", "open_clip", False, 63),
    ("MobileCLIP2-S0", "timm", False, 14),
    ("MobileCLIP2-S4", "timm", True, 49),
    ("MobileCLIP2-B", "timm", False, 32),
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the published variants, so that they convert quickly."""
    small = {name: tiny_config(name) for name in VARIANTS}
    monkeypatch.setattr(mobileclip, "VARIANTS", small)


@pytest.fixture
def fastvlm(tmp_path: Path) -> Path:
    return synthetic.write_layout(tmp_path / "source", "llava_qwen2")


def write_clip(folder: Path, variant: str, layout: str, fused: bool = False) -> Path:
    path = folder / f"{variant.lower().replace('-', '_')}.pt"
    return synthetic_clip.write(path, values(tiny_shapes(variant, layout, fused)))


def convert(source: Path, target: Path, *options: str) -> int:
    return command.main(["--model", str(source), "--mlx-path", str(target), "--verify", *options])


# Every tensor of the source.


@pytest.mark.parametrize(("unfused", "equal"), [(False, 79), (True, 43)])
@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm", "mlx-vlm"])
def test_every_tensor_of_fastvlm_is_accounted_for(
    layout: str, unfused: bool, equal: int, tmp_path: Path
) -> None:
    source = find_checkpoint(synthetic.write_layout(tmp_path, layout, unfused=unfused))
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        config, tensors = read_fastvlm(source)
        report = report_fastvlm(source, config, as_stored(tensors, dtype, {}))
        assert report.equal == equal and report.dequantized == 0
        assert report.unused <= 2  # the classifier and the tied output layer
        assert sum(report) == len(read_tensors(source.path))


@pytest.mark.parametrize(("variant", "layout", "fused", "equal"), CLIPS)
def test_every_tensor_of_mobileclip_is_accounted_for(
    variant: str, layout: str, fused: bool, equal: int, tmp_path: Path
) -> None:
    path = write_clip(tmp_path, variant, layout, fused)
    source, names = Checkpoint(path, str(path)), tiny_shapes(variant, layout, fused)
    config, tensors = read_mobileclip(source, variant)
    report = report_mobileclip(source, config, as_stored(tensors, mx.float16, {}))
    assert report.equal == equal and report.dequantized == 0
    assert report.unused == len([n for n in names if n.endswith("num_batches_tracked")])
    assert sum(report) == len(names)


@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm", "mlx-vlm"])
def test_every_tensor_is_accounted_for_after_conversion(layout: str, tmp_path: Path) -> None:
    """The same, for the written files."""
    source = find_checkpoint(synthetic.write_layout(tmp_path / "source", layout, unfused=True))
    assert convert(source.path, tmp_path / "out") == 0
    config, tensors = read_fastvlm(find_checkpoint(tmp_path / "out"))
    assert sum(report_fastvlm(source, config, tensors)) == len(read_tensors(source.path))


def test_tensors_of_a_separate_tower_are_accounted_for(fastvlm: Path, tmp_path: Path) -> None:
    """From an original, then from a converted checkpoint."""
    export = find_checkpoint(synthetic.write_layout(tmp_path / "export", "app export"))
    canonical = tmp_path / "canonical"
    assert convert(fastvlm, canonical) == 0
    for origin, tower in ((fastvlm, synthetic.TOWER), (canonical, "vision_tower.")):
        target = tmp_path / f"with {origin.name}"
        assert convert(export.path, target, "--vision-from", str(origin)) == 0
        config, written = read_fastvlm(find_checkpoint(target))
        report = report_fastvlm(export, config, written, find_checkpoint(origin))
        tensors = [name for name in read_tensors(origin) if name.startswith(tower)]
        assert sum(report) == len(read_tensors(export.path)) + len(tensors)


def test_parts_quantized_differently_are_dequantized(tmp_path: Path) -> None:
    """Queries and values that are quantised differently are dequantised and then fused."""
    quantization = {"group_size": 32, "bits": 8}
    tensors = synthetic.renamed(synthetic.apple_tensors(), synthetic.mlx_vlm_name)
    tensors = {key: synthetic.mlx_layout(key, value) for key, value in tensors.items()}
    quantized = synthetic.quantized(tensors, lambda key: quantization if "v_proj" in key else None)
    config = synthetic.apple_config(quantization=quantization)
    source = find_checkpoint(synthetic.write(tmp_path / "source", quantized, config))
    assert convert(source.path, tmp_path / "out") == 0
    written = read_fastvlm(find_checkpoint(tmp_path / "out"))
    assert report_fastvlm(source, *written).dequantized == 6


# Faults that must be reported.


def damaged(tensors: Tensors, name: str) -> Tensors:
    """A copy with one value changed, by a tenth of the largest."""
    flat = tensors[name].reshape(-1)
    flat[-1] += 0.1 * mx.abs(flat).max() + 0.01
    return tensors | {name: flat.reshape(tensors[name].shape)}


FAULTS = [
    ("projector.0.bias", "mm_projector.0.bias"),
    ("vision_tower.stages.0.blocks.0.mlp.fc1.weight", "network.0.0.convffn.conv.bn.bias"),
    ("image.projection.bias", "image_encoder.model.head.fc.bias"),
    ("image.trunk.stages.3.blocks.0.token_mixer.qkv.bias", "network.7.0.norm.bias"),
    ("text.layers.0.mixer.weight", "text_encoder.transformer.0.token_mixer.layer_scale"),
    ("text.layers.1.fc2.bias", "text_encoder.transformer.1.pre_norm_ffn.4.bias"),
]


def with_tensor(name: str, folder: Path) -> Checkpoint:
    """Write a FastVLM or a MobileCLIP that has this canonical tensor."""
    if name.startswith(("projector", "vision_tower")):
        return find_checkpoint(synthetic.write_layout(folder / "source", "llava_qwen2"))
    path = write_clip(folder, "MobileCLIP-S0", "apple")
    return Checkpoint(path, str(path))


@pytest.mark.parametrize(("name", "key"), FAULTS)
def test_fault_of_the_loader_is_reported(name: str, key: str, tmp_path: Path) -> None:
    """The error names the source tensor, or some of those folded into it."""
    source = with_tensor(name, tmp_path)
    read, report = (
        (read_fastvlm, report_fastvlm)
        if source.path.is_dir()
        else (read_mobileclip, report_mobileclip)
    )
    config, tensors = read(source)
    with pytest.raises(UnaccountedError, match=re.escape(key)):
        report(source, config, damaged(tensors, name))


@pytest.mark.parametrize("name", [name for name, _ in FAULTS[1::3]])
def test_tensor_changed_on_disk_is_reported(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = with_tensor(name, tmp_path).path
    copy_licence = pipeline.copy_licence

    def late(where: Path, directory: Path, *rest: str) -> list[str]:
        tensors = damaged(read_tensors(directory), name)
        mx.eval(tensors)  # before their file is written anew
        (directory / "model.safetensors").unlink()
        write_tensors(directory, tensors)
        return copy_licence(where, directory, *rest)

    monkeypatch.setattr(pipeline, "copy_licence", late)
    before = sorted(tmp_path.iterdir())
    assert convert(source, tmp_path / "out") == 1
    assert f"{name} was not written correctly; try another disk" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_change_in_any_layer_is_reported(tmp_path: Path) -> None:
    """Change one value in one tensor of each name, numbers aside."""
    path = write_clip(tmp_path, "MobileCLIP-S0", "apple", fused=True)
    source = Checkpoint(path, str(path))
    config, tensors = read_mobileclip(source, None)
    for name in {re.sub(r"\d+", "", name): name for name in tensors}.values():
        with pytest.raises(UnaccountedError):
            report_mobileclip(source, config, damaged(tensors, name))


def test_missing_tensor_is_reported(fastvlm: Path) -> None:
    source = find_checkpoint(fastvlm)
    config, tensors = read_fastvlm(source)
    del tensors["language_model.norm.weight"]
    with pytest.raises(UnaccountedError, match=r"model\.norm\.weight was not read"):
        report_fastvlm(source, config, tensors)


# Every stage.


def test_error_of_each_stage(
    fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zero in float32; in float16 and bfloat16 each stage has an error from rounding."""
    errors: dict[str, list[float]] = {}
    for dtype in ("float32", "float16", "bfloat16"):
        assert convert(fastvlm, tmp_path / dtype, "--dtype", dtype) == 0
        messages = capsys.readouterr().err
        count = len(read_tensors(tmp_path / dtype))
        assert f"{count} tensors were read back and are identical bit by bit." in messages
        rows = re.findall(r"^\| (.+?) \| ([\d.e+-]+) \|$", messages, re.MULTILINE)
        for stage, error in rows:
            errors.setdefault(stage, []).append(float(error))
    assert {"stem", "stage 0", "final convolution", "projector", "logits"} < errors.keys()
    for whole, half, short in errors.values():
        assert whole == 0 < half < short


def swapped(read: Read, first: str, second: str) -> Read:
    def wrong() -> Any:
        config, tensors = read()
        return config, tensors | {first: tensors[second], second: tensors[first]}

    return wrong


def test_swapped_decoder_layers_are_reported() -> None:
    _, processor = load_fastvlm("demo")
    run_stages = partial(run_fastvlm, processor=processor)
    read = partial(read_fastvlm, find_checkpoint("demo"))
    layers = [f"language_model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    sample = calibration_samples(None)[0]
    errors = stage_errors(run_stages, read, swapped(read, *layers), sample)
    assert errors["projector"] == 0
    with pytest.raises(CheckpointError, match="decoder layer 0 is off by"):
        check_errors(errors, mx.float16, quantized=False, where=Path("out"))
    check_errors(errors, mx.float16, quantized=True, where=Path("out"))
    with pytest.raises(CheckpointError, match="logits is off by nan"):
        check_errors({"logits": math.nan}, mx.float16, quantized=True, where=Path("out"))


@pytest.mark.parametrize(
    ("layers", "right", "wrong"),
    [
        ("text.layers.{}.norm2.weight", "tokens", "text layer 0"),
        ("image.trunk.layers.{}.fc1.weight", "patches", "image layer 0"),
    ],
)
def test_swapped_tower_layers_are_reported(
    layers: str, right: str, wrong: str, tmp_path: Path
) -> None:
    path = write_clip(tmp_path, "MobileCLIP-B", "apple")
    read = partial(read_mobileclip, Checkpoint(path, str(path)))
    run_stages = partial(run_mobileclip, processor=load(path)[1])
    pair = [layers.format(i) for i in (0, 1)]
    errors = stage_errors(run_stages, read, swapped(read, *pair), calibration_samples(None)[0])
    assert errors[right] == 0 < errors[wrong]
    assert list(errors).index(wrong) == list(errors).index(right) + 1


def test_stages_end_in_the_embeddings(tmp_path: Path) -> None:
    variant = "MobileCLIP-S0"
    path = write_clip(tmp_path, variant, "apple")
    model, processor = load(path, variant=variant)
    read = partial(read_mobileclip, Checkpoint(path, str(path)), variant)
    samples = calibration_samples(None)[:1]
    outputs = list(run_mobileclip(read, {}, samples, processor))
    images = mx.concatenate([each.value for each in outputs if each.stage == IMAGES])
    pixels = [processor.images([sample.image]) for sample in samples]
    expected = mx.concatenate([model.encode_image(each, normalize=True) for each in pixels])
    assert mx.array_equal(images, expected).item()
    (texts,) = [each.value for each in outputs if each.stage == TEXTS]
    expected = model.encode_text(processor.texts(LABELS), normalize=True)
    assert relative_error(texts, expected) < BATCHED  # the model divides texts among cores
