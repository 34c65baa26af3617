"""`convert --verify`, and what the loader makes of every tensor of a source."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import synthetic
import synthetic_clip
from retrace import UnaccountedError, report_fastvlm, report_mobileclip
from synthetic_clip import tiny_config, tiny_shapes, values
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

# Variant, layout, whether its branches are fused, and how many of its tensors are canonical ones
# bit by bit: every kind of tower in every layout it is published in.
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
    """The published variants with narrow towers, which convert quickly."""
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
def test_every_tensor_of_a_fastvlm(layout: str, unfused: bool, equal: int, tmp_path: Path) -> None:
    source = find_checkpoint(synthetic.write_layout(tmp_path, layout, unfused=unfused))
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        config, tensors = read_fastvlm(source)
        report = report_fastvlm(source, config, as_stored(tensors, dtype, {}))
        assert report.equal == equal and report.dequantized == 0
        assert report.unused <= 2  # the classifier and the tied output layer
        assert sum(report) == len(read_tensors(source.path))


@pytest.mark.parametrize(("variant", "layout", "fused", "equal"), CLIPS)
def test_every_tensor_of_a_mobileclip(
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
def test_every_tensor_after_conversion(layout: str, tmp_path: Path) -> None:
    """As above, of the files that the command has written."""
    source = find_checkpoint(synthetic.write_layout(tmp_path / "source", layout, unfused=True))
    assert convert(source.path, tmp_path / "out") == 0
    config, tensors = read_fastvlm(find_checkpoint(tmp_path / "out"))
    assert sum(report_fastvlm(source, config, tensors)) == len(read_tensors(source.path))


def test_a_tower_from_elsewhere(fastvlm: Path, tmp_path: Path) -> None:
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


def test_parts_that_are_packed_unlike_each_other(tmp_path: Path) -> None:
    """Queries and values that are quantised differently are dequantised and then fused."""
    how = {"group_size": 32, "bits": 8}
    tensors = synthetic.renamed(synthetic.apple_tensors(), synthetic.mlx_vlm_name)
    tensors = {key: synthetic.mlx_layout(key, value) for key, value in tensors.items()}
    packed = synthetic.quantized(tensors, lambda key: how if "v_proj" in key else None)
    config = synthetic.apple_config(quantization=how)
    source = find_checkpoint(synthetic.write(tmp_path / "source", packed, config))
    assert convert(source.path, tmp_path / "out") == 0
    written = read_fastvlm(find_checkpoint(tmp_path / "out"))
    assert report_fastvlm(source, *written).dequantized == 6


# Mistakes.


def damaged(tensors: Tensors, name: str) -> Tensors:
    """A copy with one value changed, by a tenth of the largest."""
    flat = tensors[name].reshape(-1)
    flat[-1] += 0.1 * mx.abs(flat).max() + 0.01
    return tensors | {name: flat.reshape(tensors[name].shape)}


MISTAKES = [
    ("projector.0.bias", "mm_projector.0.bias"),
    ("vision_tower.stages.0.blocks.0.mlp.fc1.weight", "network.0.0.convffn.conv.bn.bias"),
    ("image.projection.bias", "image_encoder.model.head.fc.bias"),
    ("image.trunk.stages.3.blocks.0.token_mixer.qkv.bias", "network.7.0.norm.bias"),
    ("text.layers.0.mixer.weight", "text_encoder.transformer.0.token_mixer.layer_scale"),
    ("text.layers.1.fc2.bias", "text_encoder.transformer.1.pre_norm_ffn.4.bias"),
]


def with_tensor(name: str, folder: Path) -> Checkpoint:
    """A FastVLM or a MobileCLIP that has this canonical tensor."""
    if name.startswith(("projector", "vision_tower")):
        return find_checkpoint(synthetic.write_layout(folder / "source", "llava_qwen2"))
    path = write_clip(folder, "MobileCLIP-S0", "apple")
    return Checkpoint(path, str(path))


@pytest.mark.parametrize(("name", "key"), MISTAKES)
def test_a_mistake_of_the_loader(name: str, key: str, tmp_path: Path) -> None:
    """The error names the tensor of the source, or some of those that were folded into it."""
    source = with_tensor(name, tmp_path)
    read, report = (
        (read_fastvlm, report_fastvlm)
        if source.path.is_dir()
        else (read_mobileclip, report_mobileclip)
    )
    config, tensors = read(source)
    with pytest.raises(UnaccountedError, match=re.escape(key)):
        report(source, config, damaged(tensors, name))


@pytest.mark.parametrize("name", [name for name, _ in MISTAKES[1::3]])
def test_what_the_disk_changes(
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
    assert f"{name} was not written as it is; try another disk" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_no_layer_is_overlooked(tmp_path: Path) -> None:
    """One tensor of each name, numbers aside, changed in one value."""
    path = write_clip(tmp_path, "MobileCLIP-S0", "apple", fused=True)
    source = Checkpoint(path, str(path))
    config, tensors = read_mobileclip(source, None)
    for name in {re.sub(r"\d+", "", name): name for name in tensors}.values():
        with pytest.raises(UnaccountedError):
            report_mobileclip(source, config, damaged(tensors, name))


def test_a_tensor_that_is_left_out(fastvlm: Path) -> None:
    source = find_checkpoint(fastvlm)
    config, tensors = read_fastvlm(source)
    del tensors["language_model.norm.weight"]
    with pytest.raises(UnaccountedError, match=r"nothing was made of model\.norm\.weight"):
        report_fastvlm(source, config, tensors)


# Every stage.


def test_how_far_each_stage_is_off(
    fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost in float32; in float16 and bfloat16 each stage as much as rounding takes."""
    errors: dict[str, list[float]] = {}
    for dtype in ("float32", "float16", "bfloat16"):
        assert convert(fastvlm, tmp_path / dtype, "--dtype", dtype) == 0
        told = capsys.readouterr().err
        count = len(read_tensors(tmp_path / dtype))
        assert f"{count} tensors were read back, bit by bit as they were written." in told
        rows = re.findall(r"^\| (.+?) \| ([\d.e+-]+) \|$", told, re.MULTILINE)
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


def test_a_decoder_layer_in_the_wrong_place() -> None:
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
def test_a_tower_s_layer_in_the_wrong_place(
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
    assert relative_error(texts, expected) < BATCHED  # which divides the texts among cores
