"""Towers read from Core ML packages have the weights of the original checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import core_ml_towers
import mlx.core as mx
import numpy as np
import pytest
import synthetic
import synthetic_clip
from core_ml_towers import fastvithd_program, tiny_fastvithd, write_mobileclip
from synthetic import TINY_LAYERS, Tensors
from synthetic_clip import tiny_config, tiny_shapes, values
from tolerances import relative_error

import mlx_fastvlm
import mlx_mobileclip
from convert import __main__ as converter
from mlx_fastvlm import CheckpointError
from mlx_fastvlm.loader import find_checkpoint, read_canonical
from mlx_mobileclip import ConfigError
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.models.variants import VARIANTS

ROUNDING = 1e-6  # folded twice, and rounded to float32 between


def write_export(directory: Path, dtype: str = "float32") -> Path:
    """Write an app export with its image tower in a package, as Apple publishes them."""
    synthetic.write_layout(directory, "app export")
    fastvithd_program(tiny_fastvithd(), TINY_LAYERS, dtype).write(directory / "fastvithd.mlpackage")
    return directory


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array], limit: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], np.asarray(value.astype(mx.float32))) < limit, name


@pytest.mark.parametrize(("dtype", "limit"), [("float32", ROUNDING), ("float16", 2e-3)])
def test_fastvlm_tower_is_read_from_the_package(dtype: str, limit: float, tmp_path: Path) -> None:
    export = write_export(tmp_path / "export", dtype)
    original = synthetic.write_layout(tmp_path / "original", "llava_qwen2")
    config, found = read_canonical(find_checkpoint(export))
    assert config.source["vision_from"] == "fastvithd.mlpackage"
    _, expected = read_canonical(find_checkpoint(export), original)
    assert_same(found, expected, limit)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    features = []
    for vision_from in (None, original):
        model, processor = mlx_fastvlm.load(export, dtype="float32", vision_from=vision_from)
        inputs = processor("What?", [pixels], resolution=256)
        assert inputs.pixels is not None
        features.append(np.asarray(model.encode_image(inputs.pixels)))
    assert relative_error(features[0], features[1]) < limit


def test_vision_from_may_be_an_export_with_a_package(tmp_path: Path) -> None:
    export = write_export(tmp_path / "export")
    alone = synthetic.write_layout(tmp_path / "alone", "app export")
    with pytest.raises(CheckpointError, match=r"no image tower and no fastvithd\.mlpackage"):
        mlx_fastvlm.load(alone)
    with pytest.raises(CheckpointError, match="has no image tower"):
        mlx_fastvlm.load(alone, vision_from=alone)
    _, expected = read_canonical(find_checkpoint(export))
    assert_same(read_canonical(find_checkpoint(alone), export)[1], expected, 1e-9)


def test_conversion_includes_the_tower(tmp_path: Path) -> None:
    export = write_export(tmp_path / "export")
    target = tmp_path / "converted"
    assert converter.main(["--model", str(export), "--mlx-path", str(target)]) == 0
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "mlx_fastvlm"
    assert "Image tower taken from: fastvithd.mlpackage" in (target / "NOTICE").read_text()
    assert not list(target.glob("*.mlpackage"))
    _, expected = read_canonical(find_checkpoint(export))
    _, found = read_canonical(find_checkpoint(target))
    assert_same(found, expected, 1e-3)


# MobileCLIP

STEMS = {"S0": "s0", "S1": "s1", "S2": "s2", "B-LT": "blt"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: tiny_config(name) for name in VARIANTS}
    monkeypatch.setattr(mobileclip, "VARIANTS", small)


def open_clip_names(apple: dict[str, np.ndarray]) -> dict[str, Any]:
    """Apple's tensors with open_clip's names, also for S0's text tower, which it lacks."""
    result = {}
    for key, value in synthetic_clip.open_clip_tensors(apple).items():
        if key.startswith("text."):
            key = key.replace("convffn.", "mlp.").replace("layer_scale", "layer_scale.gamma")
        result[key] = value
    return result


def write_variant(directory: Path, size: str) -> tuple[str, dict[str, np.ndarray]]:
    """Write the packages of a variant; returns its name and its tensors with Apple's names."""
    variant = f"MobileCLIP-{size}"
    apple = values(tiny_shapes(variant, "apple", fused=True))
    named = open_clip_names(apple)
    write_mobileclip(directory, f"mobileclip_{STEMS[size]}", tiny_config(variant), named)
    return variant, apple


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("size", STEMS)
def test_mobileclip_towers_equal_the_original(size: str, tmp_path: Path) -> None:
    variant, apple = write_variant(tmp_path, size)
    path = synthetic_clip.write(tmp_path / "original" / "weights.safetensors", apple)
    models = [
        mlx_mobileclip.load(given, variant=variant, dtype="float32") for given in (tmp_path, path)
    ]
    embeddings = []
    for model, processor in models:
        side = model.config.preprocess.image_size
        pixels = np.random.default_rng(1).random((2, side, side, 3), dtype=np.float32)
        image = model.encode_image(mx.array(pixels), normalize=True)
        text = model.encode_text(processor.texts(["a cat", "two dogs"]), normalize=True)
        embeddings.append((np.asarray(image), np.asarray(text)))
    for found, expected in zip(*embeddings, strict=True):
        assert relative_error(found, expected) < 1e-5
    assert models[0][0].config.source["layout"] == "Core ML"
    assert abs(float(models[0][0].logit_scale) - np.log(100)) < 1e-6
    alone = mlx_mobileclip.load(tmp_path, dtype="float32")[0]  # the only variant there
    assert alone.config.variant == variant


@pytest.mark.usefixtures("tiny")
def test_several_variants_require_a_choice(tmp_path: Path) -> None:
    for size in ("S2", "B-LT"):
        write_variant(tmp_path, size)
    with pytest.raises(ConfigError) as several:
        mlx_mobileclip.load(tmp_path)
    assert "packages of MobileCLIP-B-LT, MobileCLIP-S2; choose one" in str(several.value)
    with pytest.raises(CheckpointError, match=r"no package of MobileCLIP-S1, only of Mobile"):
        mlx_mobileclip.load(tmp_path, variant="MobileCLIP-S1")
    shutil.rmtree(tmp_path / "mobileclip_s2_text.mlpackage")
    with pytest.raises(CheckpointError, match="text tower is missing"):
        mlx_mobileclip.load(tmp_path, variant="MobileCLIP-S2")


@pytest.mark.usefixtures("tiny")
def test_mobileclip_packages_are_converted(tmp_path: Path) -> None:
    write_variant(tmp_path, "S0")
    target = tmp_path / "converted"
    given = ["--model", str(tmp_path), "--variant", "MobileCLIP-S0", "--mlx-path", str(target)]
    assert converter.main(given) == 0
    assert mlx_mobileclip.load(target)[0].config.variant == "MobileCLIP-S0"


@pytest.mark.parametrize("load", [mlx_fastvlm.load, mlx_mobileclip.load])
def test_captioners_are_refused(load: Any) -> None:
    name = "apple/mobileclip2_coca_dfn2b_s13b_docci_s12m_context77"
    with pytest.raises(CheckpointError, match=r"is a captioner \(CoCa\), which is not supported"):
        load(name)


# Other towers

Change = tuple[str, Any, str]


class ChangedTower(core_ml_towers.TowerProgram):
    """Changes one parameter of the n-th operation of a kind."""

    def __init__(self, tensors: Tensors, kind: str, number: int, change: dict[str, Any]):
        super().__init__(tensors)
        self.remaining, self.kind_, self.change = number, kind, change

    def layer(self, kind: str, **parameters: Any) -> None:
        if kind == self.kind_:
            self.remaining -= 1
            if self.remaining == -1:
                kind = self.change.get("kind", kind)
                parameters |= {k: v for k, v in self.change.items() if k != "kind"}
        super().layer(kind, **parameters)


CHANGED_TOWERS = {
    "stride": ("conv", 0, {"strides": [1, 1]}, "has strides (1, 1) and padding (1, 1, 1, 1)"),
    "padding": ("conv", 3, {"pad": [0, 0, 0, 0]}, "and padding (0, 0, 0, 0) instead of"),
    "padding at one side": ("conv", 0, {"pad_type": "same"}, "and padding () instead of"),
    "groups": ("conv", 1, {"groups": 1}, "has other groups than"),
    "dilations": ("conv", 4, {"dilations": [2, 2]}, "or dilations"),
    "shape": ("conv", 4, {"weight": np.ones((8, 1, 5, 5))}, "shape (8, 1, 5, 5) instead of"),
    "bias of another size": ("conv", 4, {"bias": np.ones(9)}, "shape (9,) instead of (8,)"),
    "no GELU": ("gelu", 2, {"kind": "relu", "mode": "EXACT"}, "is where the tower has gelu"),
    "another GELU": ("gelu", 2, {"mode": "TANH_APPROXIMATION"}, "not the exact GELU"),
    "unknown operation": ("gelu", 2, {"kind": "silu"}, "of a kind that no known tower has"),
    "bias of qkv": ("linear", 0, {"bias": np.ones(192)}, "has a bias, unlike"),
    "no LayerNorm": ("batch_norm", 0, {"mean": np.ones(64)}, "the tower has a LayerNorm"),
    "scale": ("mul", 0, {"y": np.ones((32, 1, 1))}, "has the shape (32, 1, 1) instead of"),
    "weights elsewhere": ("sub", 0, {"y": np.ones((1, 64, 1, 1))}, "has weights as its 'y'"),
}


@pytest.mark.parametrize("case", CHANGED_TOWERS)
def test_changed_operation_is_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, number, change, message = CHANGED_TOWERS[case]
    change = {
        k: v.astype(np.float32) if isinstance(v, np.ndarray) else v for k, v in change.items()
    }
    program = ChangedTower(tiny_fastvithd(), kind, number, change)
    program.x = program.input("images", (1, 3, 256, 256))
    core_ml_towers.fastvit(program, TINY_LAYERS, "layer", se=False)
    export = synthetic.write_layout(tmp_path, "app export")
    program.write(export / "fastvithd.mlpackage")
    with pytest.raises(CheckpointError) as error:
        mlx_fastvlm.load(export)
    assert message in str(error.value) and "operation " in str(error.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [((1, 2, 1, 1, 1), "is where the tower has"), ((1, 2, 1, 1, 3), "is where")],
)
def test_tower_of_another_depth_is_refused(
    layers: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    tensors = tiny_fastvithd()
    last = {k: v for k, v in tensors.items() if k.startswith("stages.4.blocks.1.")}
    tensors |= {k.replace("blocks.1", "blocks.2"): v for k, v in last.items()}
    export = synthetic.write_layout(tmp_path, "app export")
    fastvithd_program(tensors, layers).write(export / "fastvithd.mlpackage")
    with pytest.raises(CheckpointError, match=message):
        mlx_fastvlm.load(export)


@pytest.mark.parametrize("where", ["before", "after"])
def test_operations_around_the_tower_are_refused(where: str, tmp_path: Path) -> None:
    program = core_ml_towers.TowerProgram(tiny_fastvithd())
    program.x = program.input("images", (1, 3, 256, 256))
    if where == "before":
        program.layer("mul", y=2 / 255)
    core_ml_towers.fastvit(program, TINY_LAYERS, "layer", se=False)
    if where == "after":
        program.conv(np.ones((4, 256, 1, 1), np.float32), np.ones(4, np.float32))
    export = synthetic.write_layout(tmp_path, "app export")
    program.write(export / "fastvithd.mlpackage")
    message = "prepares pixels with" if where == "before" else "continues after the end"
    with pytest.raises(CheckpointError, match=message):
        mlx_fastvlm.load(export)


def test_unused_constants_are_named_in_a_warning(tmp_path: Path) -> None:
    program = fastvithd_program(tiny_fastvithd(), TINY_LAYERS)
    program.const(np.ones(5, np.float32), name="left_over")
    export = synthetic.write_layout(tmp_path, "app export")
    package = export / "fastvithd.mlpackage"
    program.write(package)
    with pytest.warns(UserWarning, match="nothing uses left_over; not read as weights"):
        mlx_fastvlm.load(export)
