"""`convert --verify`: nothing that goes wrong between source and result passes."""

import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
import synthetic
import synthetic_clip
from synthetic_clip import tiny_config, tiny_shapes, values

from convert import __main__ as command
from convert import conversion, verify
from convert.calibration import LABELS, samples
from convert.quantize import Tensors, as_stored
from convert.retrace import retrace_fastvlm, retrace_mobileclip
from convert.walk import IMAGES, TEXTS, Read, walk_fastvlm, walk_mobileclip
from mlx_fastvlm.loader import find_checkpoint
from mlx_fastvlm.loader import load as load_fastvlm
from mlx_fastvlm.loader import read_canonical as read_fastvlm
from mlx_mobileclip import CheckpointError, load
from mlx_mobileclip.checkpoint import read_tensors, write_tensors
from mlx_mobileclip.hub import Checkpoint
from mlx_mobileclip.loader import import_converter
from mlx_mobileclip.loader import read_canonical as read_mobileclip
from mlx_mobileclip.variants import VARIANTS

# Variant, layout, whether fused, and how many of the source's tensors are only moved: every kind
# of tower in every layout that it comes in. FastViT has four stages or five, ViT two stems.
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
    """The registry with narrow towers, so that whole checkpoints convert in no time."""
    small = {name: tiny_config(name) for name in VARIANTS}
    monkeypatch.setattr(import_converter("mobileclip"), "VARIANTS", small)


@pytest.fixture
def fastvlm(tmp_path: Path) -> Path:
    return synthetic.write_layout(tmp_path / "source", "llava_qwen2")


def write_clip(folder: Path, variant: str, layout: str, fused: bool = False) -> Path:
    path = folder / f"{variant.lower().replace('-', '_')}.pt"
    return synthetic_clip.write(path, values(tiny_shapes(variant, layout, fused)))


def convert(source: Path, target: Path, *options: str) -> int:
    return command.main(["--model", str(source), "--mlx-path", str(target), "--verify", *options])


# Every tensor of the source.


@pytest.mark.parametrize(("unfused", "moved"), [(False, 79), (True, 43)])
@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm", "mlx-vlm"])
def test_what_became_of_a_fastvlm(layout: str, unfused: bool, moved: int, tmp_path: Path) -> None:
    source = find_checkpoint(synthetic.write_layout(tmp_path, layout, unfused=unfused))
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        config, tensors = read_fastvlm(source)
        account = retrace_fastvlm(source, config, as_stored(tensors, dtype, {}))
        assert account.found == moved and account.unpacked == 0
        assert account.unused <= 2  # the classifier and the tied output layer
        assert sum(account) == len(read_tensors(source.path))


@pytest.mark.parametrize(("variant", "layout", "fused", "moved"), CLIPS)
def test_what_became_of_a_mobileclip(
    variant: str, layout: str, fused: bool, moved: int, tmp_path: Path
) -> None:
    path = write_clip(tmp_path, variant, layout, fused)
    source, names = Checkpoint(path, str(path)), tiny_shapes(variant, layout, fused)
    config, tensors = read_mobileclip(source, variant)
    account = retrace_mobileclip(source, config, as_stored(tensors, mx.float16, {}))
    assert account.found == moved and account.unpacked == 0
    assert account.unused == len([n for n in names if n.endswith("num_batches_tracked")])
    assert sum(account) == len(names)


def test_a_tower_from_elsewhere(
    fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an original, then from a converted one; the tower's tensors and the export's."""
    export = synthetic.write_layout(tmp_path / "export", "app export")
    canonical = tmp_path / "canonical"
    assert convert(fastvlm, canonical) == 0
    for origin, tower in ((fastvlm, synthetic.TOWER), (canonical, "vision_tower.")):
        assert convert(export, tmp_path / f"with {origin.name}", "--vision-from", str(origin)) == 0
        tensors = [name for name in read_tensors(origin) if name.startswith(tower)]
        count = len(read_tensors(export)) + len(tensors)
        assert f"{count} tensors of the source: " in capsys.readouterr().err


def test_parts_that_are_packed_unlike_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are fused as floats; of these nothing is said but that they were unpacked."""
    how = {"group_size": 32, "bits": 8}
    tensors = synthetic.renamed(synthetic.apple_tensors(), synthetic.mlx_vlm_name)
    tensors = {key: synthetic.mlx_layout(key, value) for key, value in tensors.items()}
    packed = synthetic.quantized(tensors, lambda key: how if "v_proj" in key else None)
    config = synthetic.apple_config(quantization=how)
    source = synthetic.write(tmp_path / "source", packed, config)
    assert convert(source, tmp_path / "out") == 0
    assert "; 6 unpacked, as what they" in capsys.readouterr().err


def test_packed_layers_are_looked_at_as_they_were() -> None:
    written = {"a.weight": "ours", "b.weight": "packed", "b.scales": "packed", "b.bias": "ours"}
    before = {"a.weight": "theirs", "b.weight": "floats", "b.bias": "theirs"}
    looked_at = verify.as_before(cast(Tensors, written), cast(Tensors, before), ["b"])
    assert looked_at == {"a.weight": "ours", "b.weight": "floats", "b.bias": "theirs"}


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


def clip_or_fastvlm(name: str, folder: Path) -> Path:
    if name.startswith(("projector", "vision_tower")):
        return synthetic.write_layout(folder / "source", "llava_qwen2")
    return write_clip(folder, "MobileCLIP-S0", "apple")


@pytest.mark.parametrize(("name", "message"), MISTAKES)
def test_a_mistake_that_is_written_faithfully(
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As if the converter had made it: it is made again when looked at again."""
    source = clip_or_fastvlm(name, tmp_path)
    for module in ("read_canonical", "read_mobileclip"):
        right = getattr(command, module)

        def wrong(checkpoint: Checkpoint, *options: Any, right: Any = right) -> Any:
            config, tensors = right(checkpoint, *options)
            return config, damaged(tensors, name) if checkpoint.path == source else tensors

        monkeypatch.setattr(command, module, wrong)
    before = sorted(tmp_path.iterdir())
    assert convert(source, tmp_path / "out", "--dtype", "float32") == 1
    (error,) = re.findall("^error: (.*)", capsys.readouterr().err, re.MULTILINE)
    assert message in error and error.endswith("not what was made of it; please report this")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", [name for name, _ in MISTAKES[1::3]])
def test_what_the_disk_changes(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = clip_or_fastvlm(name, tmp_path)
    copy_licence = conversion.copy_licence

    def late(where: Path, directory: Path, *rest: str) -> None:
        tensors = damaged(read_tensors(directory), name)
        mx.eval(tensors)  # before their file is written anew
        write_tensors(directory, tensors)
        copy_licence(where, directory, *rest)

    monkeypatch.setattr(conversion, "copy_licence", late)
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
        with pytest.raises(CheckpointError, match="not what was made of it"):
            retrace_mobileclip(source, config, damaged(tensors, name))


def test_what_nothing_was_made_of(fastvlm: Path) -> None:
    source = find_checkpoint(fastvlm)
    config, tensors = read_fastvlm(source)
    del tensors["language_model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"nothing was made of model\.norm\.weight"):
        retrace_fastvlm(source, config, tensors)


# Every stage.


def test_how_far_each_stage_is_off(
    fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost in float32; in float16 and bfloat16 each stage as much as rounding takes."""
    errors: dict[str, list[float]] = {}
    for dtype in ("float32", "float16", "bfloat16"):
        assert convert(fastvlm, tmp_path / dtype, "--dtype", dtype) == 0
        rows = re.findall(r"^\| (.+?) \| ([\d.e+-]+) \|$", capsys.readouterr().err, re.MULTILINE)
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
    walk = partial(walk_fastvlm, processor=processor)
    read = partial(read_fastvlm, find_checkpoint("demo"))
    layers = [f"language_model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    errors = verify.stage_errors(walk, read, swapped(read, *layers), samples(None)[0])
    assert errors["projector"] == 0
    with pytest.raises(CheckpointError, match="decoder layer 0 is off by"):
        verify.check_errors(errors, mx.float16, packed=False, where=Path("out"))


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
    walk = partial(walk_mobileclip, processor=load(path)[1])
    pair = [layers.format(i) for i in (0, 1)]
    errors = verify.stage_errors(walk, read, swapped(read, *pair), samples(None)[0])
    assert errors[right] == 0 < errors[wrong]
    assert list(errors).index(wrong) == list(errors).index(right) + 1


def test_stages_end_in_the_embeddings(tmp_path: Path) -> None:
    variant = "MobileCLIP-S0"
    path = write_clip(tmp_path, variant, "apple")
    model, processor = load(path, variant=variant)
    read = partial(read_mobileclip, Checkpoint(path, str(path)), variant)
    shown = samples(None)[:1]
    seen = list(walk_mobileclip(read, {}, shown, processor))
    images = mx.concatenate([each.value for each in seen if each.stage == IMAGES])
    pixels = [processor.images([sample.image]) for sample in shown]
    expected = mx.concatenate([model.encode_image(each, normalize=True) for each in pixels])
    assert mx.array_equal(images, expected).item()
    (texts,) = [each.value for each in seen if each.stage == TEXTS]
    assert mx.array_equal(texts, model.encode_text(processor.texts(LABELS), normalize=True)).item()
