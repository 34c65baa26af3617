"""Full-size towers that coremltools exports are read back and compared with PyTorch.

Weights are random. Apple's own files were not available: the tests assume that they have the form
that coremltools gives to Apple's published code today.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
from synthetic_clip import listing, values
from tolerances import relative_error

from mlx_mobileclip import MobileCLIP, load
from mlx_mobileclip.checkpoints.core_ml.towers import read_image_tower
from mlx_mobileclip.checkpoints.reparameterize import fold_fastvit
from mlx_mobileclip.checkpoints.source import Source
from mlx_mobileclip.layers import whole
from mlx_mobileclip.models.fastvit import PRESETS, FastViT, FastViTConfig
from mlx_mobileclip.models.variants import VARIANTS
from mlx_mobileclip.preprocess.tokenizer import clip_tokenizer

pytest.importorskip("coremltools", reason="needs the parity extra")
import core_ml_export
import oracle
from core_ml_export import ct, torch

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

LIMIT = 1e-4
TEXTS = ["a photo of a cat", "two dogs play in the snow"]


def pixels_of(size: int) -> np.ndarray:
    return np.random.default_rng(0).random((2, size, size, 3), dtype=np.float32)


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < LIMIT, errors


def map_stages(trunk: FastViT, pixels: np.ndarray) -> dict[str, Any]:
    """Outputs of our FastViT, stage by stage."""
    x = trunk.stem(mx.array(pixels))
    outputs = {"stem": whole(x)}
    for i, stage in enumerate(trunk.stages):
        x = stage(x)
        outputs[f"stages.{i}"] = whole(x)
        mx.eval(outputs)
    return outputs | {"final_conv": trunk.final_conv(x)}


def load_tower(path: Path, config: FastViTConfig) -> FastViT:
    """Our tower with the weights of a package."""
    source = Source(read_image_tower(path, path.name, config), lambda name: name, path.name)
    trunk = FastViT(config)
    trunk.load_weights(list(fold_fastvit(source, config).items()), strict=True)
    source.finish()
    return trunk


def test_fastvithd_equals_pytorch(tmp_path: Path) -> None:
    """iOS 16 and float32; each of the 24 + 20 blocks' weights, and every stage at 256 px."""
    trunk = core_ml_export.fastvithd(synthetic.apple_tensors("0.5b"))
    path = tmp_path / "fastvithd.mlpackage"
    core_ml_export.export(
        core_ml_export.Features(trunk), torch.rand(1, 3, 256, 256), path, half=False
    )
    pixels = pixels_of(256)
    with oracle.recorded(oracle.tower_modules(trunk)) as theirs, torch.no_grad():
        trunk.forward_features(oracle.nchw(pixels))
    compare(map_stages(load_tower(path, PRESETS["fastvithd"]), pixels), theirs)


@pytest.mark.parametrize(
    ("variant", "stem", "half"),
    [
        ("MobileCLIP-S0", "s0", False),
        ("MobileCLIP-S2", "s2", True),
        ("MobileCLIP-B-LT", "blt", True),
    ],
)
def test_mobileclip_towers_equal_pytorch(
    variant: str, stem: str, half: bool, tmp_path: Path
) -> None:
    """In float32, coremltools folds; in float16, PyTorch gets the same rounded weights."""
    config = VARIANTS[variant]
    towers = core_ml_export.apple_towers(config, values(listing(variant, "apple", fused=True)))
    if half:
        towers = tuple(core_ml_export.folded_and_rounded(tower) for tower in towers)
    image, text = towers
    size = config.preprocess.image_size
    given = {"image": torch.rand(1, 3, size, size), "text": torch.ones((1, 77), dtype=torch.int32)}
    for name, tower in (("image", image), ("text", text)):
        path = tmp_path / f"mobileclip_{stem}_{name}.mlpackage"
        core_ml_export.export(tower, given[name], path, half=half)
    model, processor = load(tmp_path, variant=variant, dtype="float32")
    pixels, ids = pixels_of(size), processor.texts(TEXTS)
    assert np.array_equal(ids, clip_tokenizer()(TEXTS))
    compare_image(model, image, pixels)
    compare_text(model, text, np.asarray(ids))


def compare_image(model: MobileCLIP, image: Any, pixels: np.ndarray) -> None:
    trunk = model.image.trunk
    if isinstance(trunk, FastViT):
        modules = oracle.tower_modules(image)
        ours = map_stages(trunk, pixels)
        last = ours["final_conv"]
    else:
        modules = {f"layers.{i}": layer for i, layer in enumerate(image.transformer)}
        last, ours = trunk.embed(mx.array(pixels)), {}
        for i, layer in enumerate(trunk.layers):
            last = ours[f"layers.{i}"] = layer(last)
        last = trunk.pool(last)
    ours["embedding"] = model.image.project(last)
    with oracle.recorded(modules) as theirs, torch.no_grad():
        theirs["embedding"] = image(oracle.nchw(pixels)).numpy()
    compare(ours, theirs)


def compare_text(model: MobileCLIP, text: Any, ids: np.ndarray) -> None:
    assert model.text is not None
    x, ours = model.text.embed(mx.array(ids)), dict[str, Any]()
    for i, layer in enumerate(model.text.layers):
        x = ours[f"layers.{i}"] = layer(x, causal=model.text.causal)
    ours["embedding"] = model.text.pool(x, mx.array(ids))
    modules = {f"layers.{i}": layer for i, layer in enumerate(text.transformer)}
    with oracle.recorded(modules) as theirs, torch.no_grad():
        theirs["embedding"] = text(torch.from_numpy(ids.astype(np.int64))).numpy()
    compare(ours, theirs)


# Compressed forms, on a tower as wide as MobileCLIP-S0's with one block in each stage.

SHALLOW = replace(PRESETS["mci0"], layers=(1, 1, 1, 1))


def compressions(target: str) -> dict[str, Callable[[Any], Any]]:
    """Compressions of coremltools for programs of iOS 16 or iOS 18."""
    import coremltools.optimize.coreml as optimize

    def using(apply: Any, config: Any) -> Callable[[Any], Any]:
        return lambda model: apply(model, optimize.OptimizationConfig(config))

    palettize, quantize = optimize.palettize_weights, optimize.linear_quantize_weights
    palette, linear = optimize.OpPalettizerConfig, optimize.OpLinearQuantizerConfig
    few = {"weight_threshold": 512}
    if target == "iOS16":
        prune = optimize.OpMagnitudePrunerConfig(target_sparsity=0.5, **few)
        return {
            "palette of 4 bits": using(palettize, palette(mode="uniform", nbits=4, **few)),
            "palette of 6 bits": using(palettize, palette(mode="uniform", nbits=6, **few)),
            "int8": using(quantize, linear(mode="linear_symmetric", dtype="int8", **few)),
            "uint8": using(quantize, linear(mode="linear", dtype="uint8", **few)),
            "sparse": using(optimize.prune_weights, prune),
        }
    groups = {"granularity": "per_grouped_channel", "group_size": 16}
    blocks = {"granularity": "per_block", "block_size": 32}
    return {
        "grouped palettes of 3 bits": using(palettize, palette("uniform", 3, **groups, **few)),
        "grouped palettes of 4 bits": using(palettize, palette("uniform", 4, **groups, **few)),
        "blockwise int4": using(quantize, linear("linear", "int4", **blocks, **few)),
        "blockwise int8": using(quantize, linear("linear_symmetric", "int8", **blocks, **few)),
    }


@pytest.mark.parametrize(("target", "half"), [("iOS16", False), ("iOS18", True)])
def test_compressed_weights_equal_pytorch(target: str, half: bool, tmp_path: Path) -> None:
    """PyTorch has the weights as decompressed by coremltools."""
    import coremltools.optimize.coreml as optimize
    import timm

    name = "fastvit_mci0"
    options = {"layers": SHALLOW.layers, "num_classes": 0, "global_pool": ""}
    trunk = timm.create_model(name, inference_mode=True, **options).eval()
    shapes = {
        k: tuple(v.shape)
        for k, v in trunk.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    core_ml_export.load(trunk, values(shapes), "", {})
    trunk = core_ml_export.folded_and_rounded(trunk)
    path = tmp_path / "plain.mlpackage"
    model = core_ml_export.export(
        trunk, torch.rand(1, 3, 64, 64), path, half=half, target=getattr(ct.target, target)
    )
    pixels = pixels_of(64)
    for form, compress in compressions(target).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compressed = compress(model)
            compressed.save(str(tmp_path / "compressed.mlpackage"))
            optimize.decompress_weights(compressed).save(str(tmp_path / "unpacked.mlpackage"))
        unpacked = read_image_tower(tmp_path / "unpacked.mlpackage", form, SHALLOW)
        layer = "stages.1.blocks.0.mlp.fc1.weight"
        before = read_image_tower(path, form, SHALLOW)[layer]
        assert not mx.array_equal(before, unpacked[layer]).item(), form
        state = {k: torch.from_numpy(np.array(v.astype(mx.float32))) for k, v in unpacked.items()}
        trunk.load_state_dict(state, strict=False)
        with oracle.recorded(oracle.tower_modules(trunk)) as theirs, torch.no_grad():
            trunk.forward_features(oracle.nchw(pixels))
        print(form)
        compare(map_stages(load_tower(tmp_path / "compressed.mlpackage", SHALLOW), pixels), theirs)
