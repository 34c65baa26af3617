"""Every MobileCLIP variant in every layout, by its full-size key listing and as a tiny model."""

import dataclasses
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic_clip
import torch_file
from synthetic_clip import PUBLISHED, layouts_of, listing, tiny_config, tiny_shapes, values

from convert import __main__ as converter
from mlx_mobileclip import CheckpointError, ConfigError, MobileCLIP, ModelError, load
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.checkpoints.published_names import published_variant
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.models.clip import MobileCLIPConfig
from mlx_mobileclip.models.fastvit import FastViTConfig
from mlx_mobileclip.models.variants import VARIANTS, variant_named

LAYOUT = {layout.name: layout for layout in mobileclip.MOBILECLIP_LAYOUTS}
CASES = [(v, layout, fused) for v in PUBLISHED for layout in layouts_of(v) for fused in (0, 1)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the registered variants, so that whole checkpoints load quickly."""
    small = {name: tiny_config(name) for name in VARIANTS}
    monkeypatch.setattr(mobileclip, "VARIANTS", small)


def canonical(
    tensors: dict[str, Any], config: MobileCLIPConfig, layout: str
) -> dict[str, mx.array]:
    arrays = {key: mx.array(value) for key, value in tensors.items()}
    return mobileclip.canonical_tensors(arrays, config, LAYOUT[layout], "test")


@pytest.mark.parametrize(("variant", "layout", "fused"), CASES)
def test_full_size_listings_match_the_model(variant: str, layout: str, fused: int) -> None:
    tensors = {key: mx.zeros(shape) for key, shape in listing(variant, layout, bool(fused)).items()}
    config = VARIANTS[variant]
    if layout == "timm":
        config = replace(config, text=None)
    found = mobileclip.canonical_tensors(tensors, config, LAYOUT[layout], variant)
    expected = named_parameters(MobileCLIP(config))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_tiny_towers_differ_where_the_published_do() -> None:
    for a, b in combinations(VARIANTS, 2):
        small = tiny_config(a), tiny_config(b)
        for tower in ("image", "text"):
            same = getattr(VARIANTS[a], tower) == getattr(VARIANTS[b], tower)
            assert (getattr(small[0], tower) == getattr(small[1], tower)) == same, (a, b, tower)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("variant", "other"),
    [("S0", "2-S0"), ("S1", "2-S0"), ("S1", "2-S2"), ("2-S3", "2-S4"), ("2-S4", "2-S3")],
)
def test_weights_of_another_variant_are_refused(variant: str, other: str, tmp_path: Path) -> None:
    variant, other = (f"MobileCLIP{n if n[0] == '2' else '-' + n}" for n in (variant, other))
    tensors = values(tiny_shapes(variant, layouts_of(variant)[0]))
    path = synthetic_clip.write(tmp_path / "weights.safetensors", tensors)
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        load(path, variant=other)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_variant_runs_at_tiny_width(variant: str) -> None:
    layout = layouts_of(variant)[0]
    config = tiny_config(variant)
    model = MobileCLIP(config)
    weights = canonical(values(tiny_shapes(variant, layout)), config, layout)
    model.load_weights(list(weights.items()), strict=True)
    size = config.preprocess.image_size
    rng = np.random.default_rng(0)
    pixels = mx.array(rng.random((3, size, size, 3), dtype=np.float32))
    images = model.encode_image(pixels, normalize=True)
    ids = np.zeros((2, 77), np.int32)
    ids[0, :4], ids[1, :3] = (49406, 320, 2368, 49407), (49406, 539, 49407)
    texts = model.encode_text(mx.array(ids), normalize=True)
    assert images.shape == (3, config.embed_dim) and texts.shape == (2, config.embed_dim)
    for rows in (images, texts):
        assert mx.allclose(mx.linalg.norm(rows, axis=-1), mx.array(1.0)).item()
        assert abs((rows[0] @ rows[1]).item()) < 0.99999
    alone = model.encode_image(pixels[1:2], normalize=True)
    assert mx.allclose(alone[0], images[1], atol=1e-5).item()


@pytest.mark.parametrize("variant", ["MobileCLIP-B", "MobileCLIP2-B", "MobileCLIP2-S0"])
def test_only_causal_towers_ignore_ids_after_the_end(variant: str) -> None:
    config = tiny_config(variant)
    model = MobileCLIP(config)
    tensors = values(tiny_shapes(variant, "open_clip"))
    model.load_weights(list(canonical(tensors, config, "open_clip").items()))
    ids = np.zeros((2, 77), np.int32)
    ids[:, :4] = 49406, 320, 2368, 49407
    ids[1, 4:] = 49407
    a, b = model.encode_text(mx.array(ids), normalize=True)
    assert ((a @ b).item() > 0.999999) == (config.text is not None and config.text.causal)


@pytest.mark.parametrize("fused", [False, True])
def test_s0_image_tower_is_the_same_in_timm_layout(fused: bool) -> None:
    """The text tower of S0 exists in Apple's layout only."""
    config = tiny_config("MobileCLIP-S0")
    apple = values(tiny_shapes("MobileCLIP-S0", "apple", fused))
    expected = canonical(apple, config, "apple")
    prefix = "visual.trunk."
    renamed = synthetic_clip.open_clip_tensors(apple)
    trunk = {k[len(prefix) :]: v for k, v in renamed.items() if k.startswith(prefix)}
    assert {k: v.shape for k, v in trunk.items()} == tiny_shapes("MobileCLIP2-S0", "timm", fused)
    found = canonical(trunk, replace(config, text=None), "timm")
    assert found.keys() == {k for k in expected if k.startswith("image.")}
    assert all(mx.array_equal(found[k], expected[k]).item() for k in found)


@pytest.mark.parametrize("variant", ["MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP-B"])
@pytest.mark.parametrize("fused", [False, True])
def test_apple_and_open_clip_layouts_hold_the_same_model(variant: str, fused: bool) -> None:
    config = tiny_config(variant)
    apple = values(tiny_shapes(variant, "apple", fused))
    expected = canonical(apple, config, "apple")
    renamed = synthetic_clip.open_clip_tensors(apple)
    for tensors in (renamed, {k: v for k, v in renamed.items() if not k.endswith("head.bias")}):
        found = canonical(dict(tensors), config, "open_clip")
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[k], expected[k]).item() for k in expected)
    prefix = "visual.trunk."
    trunk = {k[len(prefix) :]: v for k, v in renamed.items() if k.startswith(prefix)}
    found = canonical(trunk, replace(config, text=None), "timm")
    assert found.keys() == {k for k in expected if k.startswith("image.")}
    assert all(mx.array_equal(found[k], expected[k]).item() for k in found)


FILES = ("model.safetensors", "pytorch_model.bin", "mobileclip_s0.pt")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_file_format_and_dtype(file: str, dtype: str, tmp_path: Path) -> None:
    variant = "MobileCLIP-S0"
    tensors = values(tiny_shapes(variant, "apple"))
    path = synthetic_clip.write(tmp_path / file, tensors, getattr(mx, dtype))
    expected = canonical(tensors, tiny_config(variant), "apple")
    for source in (path, tmp_path):
        model, _ = load(source, variant=variant, dtype="float32")
        found = named_parameters(model)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = {"float32": 0, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
            assert mx.allclose(found[name], value, rtol=tolerance, atol=tolerance).item(), name


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_wrapped_state_dicts_are_read(wrapper: str, tmp_path: Path) -> None:
    tensors = values(tiny_shapes("MobileCLIP2-S0", "open_clip"))
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)  # an option of open_clip
    named = {f"module.{key}": value for key, value in tensors.items()}
    path = torch_file.write_torch(tmp_path / "mobileclip2_s0.pt", named, wrapper=wrapper)
    model, _ = load(path)
    assert model.config.variant == "MobileCLIP2-S0"
    assert model.logit_scale is not None and abs(model.logit_scale.item() - 4.2) < 1e-6


@pytest.mark.usefixtures("tiny")
def test_timm_trunk_embeds_images_only(tmp_path: Path) -> None:
    tensors = values(tiny_shapes("MobileCLIP2-S0", "timm"))
    folder = tmp_path / "fastvit_mci0.apple_mclip2_dfndr2b"
    synthetic_clip.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text('{"architecture": "fastvit_mci0", "num_classes": 512}')
    model, processor = load(folder)
    assert model.text is None and model.config.text is None
    assert model.encode_image(processor.images([np.zeros((9, 9, 3), np.uint8)])).shape == (1, 32)
    with pytest.raises(ModelError, match="image tower only"):
        model.encode_text(processor.texts(["a cat"]))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("fused", [False, True])
def test_converted_checkpoint_is_the_same_model(
    fused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = synthetic_clip.write(
        tmp_path / "a" / "mobileclip_s0.pt", values(tiny_shapes("MobileCLIP-S0", "apple", fused))
    )
    target = tmp_path / "out"
    options = ["--model", str(source), "--mlx-path", str(target), "--dtype", "float32"]
    assert converter.main(options) == 0, capsys.readouterr().err
    assert sorted(p.name for p in target.iterdir()) == [
        "NOTICE",
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    ours, processor = load(target)
    theirs, _ = load(source)
    assert ours.config == replace(theirs.config, source=ours.config.source)
    assert processor.preprocess.image_size == 64
    a, b = named_parameters(ours), named_parameters(theirs)
    assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)
    again = tmp_path / "again"
    options = ["--model", str(target), "--mlx-path", str(again), "--dtype", "float32"]
    assert converter.main(options) == 0
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (target / file).read_bytes()
    with pytest.raises(ConfigError, match="leave out variant"):
        load(target, variant="MobileCLIP-S0")


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_json(variant: str) -> None:
    for config in (VARIANTS[variant], replace(VARIANTS[variant], text=None)):
        values = json.loads(json.dumps(config.to_json()))
        assert MobileCLIPConfig.from_json(values, "config.json") == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format_version",), 99),
        (("image_config", "stem_padding"), 7),
        (("image_config", "tower"), "resnet"),
        (("image_config", "width"), 1 << 20),
        (("image_config", "patch_size"), 8),
        (("text_config", "causal"), None),
        (("text_config", "heads"), 7),
        (("preprocess_config", "mean"), [0, 0]),
        (("preprocess_config", "std"), [0, 1, 1]),
        (("preprocess_config", "interpolation"), "nearest"),
        (("preprocess_config", "image_size"), 256),
    ],
)
def test_wrong_configs_are_refused(path: tuple[str, ...], value: Any) -> None:
    values = json.loads(json.dumps(VARIANTS["MobileCLIP2-B"].to_json()))
    section = values
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(ConfigError, match=path[-1]):
        MobileCLIPConfig.from_json(values, "config.json")


def test_registry_matches_published_variants() -> None:
    assert len(PUBLISHED) == 14
    facts = {
        name: (c.embed_dim, c.preprocess.image_size, c.preprocess.interpolation, c.text.causal)
        for name, c in VARIANTS.items()
        if c.text is not None
    }
    assert facts["MobileCLIP-S0"] == (512, 256, "bilinear", False)
    assert facts["MobileCLIP-B-LT"] == (512, 224, "bilinear", True)
    assert facts["MobileCLIP2-B"] == (512, 224, "bilinear", True)
    assert facts["MobileCLIP2-S4"] == (768, 256, "bilinear", False)
    assert facts["MobileCLIP2-L-14"] == (768, 224, "bicubic", False)
    normalised = {name for name, c in VARIANTS.items() if c.preprocess.mean != (0, 0, 0)}
    assert normalised == {n for n in VARIANTS if n.endswith(("S3", "S4", "L-14"))}
    stems = {
        n: (c.image.stem_padding, c.image.eps)
        for n, c in VARIANTS.items()
        if not isinstance(c.image, FastViTConfig)
    }
    assert stems["MobileCLIP-B"] == stems["MobileCLIP-B-LT"] == (1, 1e-5)
    assert stems["MobileCLIP2-B"] == stems["MobileCLIP-B:open_clip"] == (0, 1e-6)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("apple/MobileCLIP-S0", "MobileCLIP-S0"),
        ("apple/MobileCLIP-B-LT", "MobileCLIP-B-LT"),
        ("apple/MobileCLIP-S1-OpenCLIP", "MobileCLIP-S1"),
        ("apple/MobileCLIP2-L-14", "MobileCLIP2-L-14"),
        ("timm/MobileCLIP2-S3-OpenCLIP", "MobileCLIP2-S3"),
        ("timm/fastvit_mci4.apple_mclip2_dfndr2b", "MobileCLIP2-S4"),
        ("timm/vit_base_mci_224.apple_mclip2_dfndr2b", "MobileCLIP2-B"),
        ("timm/vit_large_patch14_clip_224.apple_mclip2_dfndr2b", "MobileCLIP2-L-14"),
        ("timm/fastvit_mci0.apple_mclip", "MobileCLIP-S0"),
        ("timm/fastvit_mci1.apple_mclip", "MobileCLIP-S1"),
        ("./fastvit_mci2.apple_mclip", "MobileCLIP-S2"),
        ("fastvit_mci2.apple_mclip.safetensors", "MobileCLIP-S2"),
        ("timm/vit_base_mci_224.apple_mclip", "MobileCLIP-B"),
        ("timm/vit_base_mci_224.apple_mclip_lt", "MobileCLIP-B-LT"),
        ("timm/fastvit_mci0.apple_mclip_lt", None),
        ("timm/fastvit_mci0.somebody_elses", None),
        ("apple/mobileclip_b_lt_timm", "MobileCLIP-B-LT"),
        ("downloads/mobileclip_blt.pt", "MobileCLIP-B-LT"),
        ("./mobileclip2_l14.pt", "MobileCLIP2-L-14"),
        ("/data/models/MobileCLIP2-S0", "MobileCLIP2-S0"),
        ("somebody/MobileCLIP2-S0", None),
        ("apple/FastVLM-0.5B", None),
        ("timm/fastvit_t8.apple_in1k", None),
        ("weights.pt", None),
        ("MobileCLIP2-S1", None),
    ],
)
def test_published_names(name: str, variant: str | None) -> None:
    assert published_variant(name) == variant


def test_variant_names_are_forgiving() -> None:
    assert variant_named("mobileclip2_l14") == variant_named("MobileCLIP2-L/14")
    assert variant_named("mobileclip_b:open_clip") == "MobileCLIP-B:open_clip"
    assert variant_named("S0") is None


@pytest.mark.usefixtures("tiny")
def test_unknown_name_requires_variant(tmp_path: Path) -> None:
    tensors = values(tiny_shapes("MobileCLIP2-B", "open_clip"))
    path = synthetic_clip.write(tmp_path / "finetuned.safetensors", tensors)
    with pytest.raises(ConfigError, match="--variant"):
        load(path)
    with pytest.raises(ConfigError, match="is not one of MobileCLIP-S0"):
        load(path, variant="B")
    assert load(path, variant="mobileclip2_b")[0].config.variant == "MobileCLIP2-B"
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        load(path, variant="MobileCLIP2-S0")


@pytest.mark.usefixtures("tiny")
def test_open_clip_config_is_honoured(tmp_path: Path) -> None:
    folder = tmp_path / "MobileCLIP2-B"
    tensors = values(tiny_shapes("MobileCLIP2-B", "open_clip"))
    synthetic_clip.write(folder / "open_clip_model.safetensors", tensors)
    synthetic_clip.write(folder / "other.safetensors", {"x": np.zeros(1, np.float32)})
    stated = {
        "model_cfg": {"text_cfg": {"no_causal_mask": False}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bicubic"},
    }
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps(stated))
    preprocess = load(folder)[0].config.preprocess
    assert dataclasses.astuple(preprocess)[1:] == ("bicubic", (0.1, 0.2, 0.3), (1, 1, 1))
    stated["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    path.write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match="causal mask"):
        load(folder)
    stated["model_cfg"] = {}
    stated["preprocess_cfg"]["resize_mode"] = "squash"
    path.write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match="resize_mode"):
        load(folder)


@pytest.mark.usefixtures("tiny")
def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    tensors = values(tiny_shapes("MobileCLIP-S0", "apple"))
    missing, transposed = "text_encoder.final_layer_norm.weight", "image_encoder.model.head.proj"
    del tensors[missing]
    tensors[transposed] = tensors[transposed].T.copy()
    tensors["text_encoder.surprise"] = np.zeros(1, np.float32)
    path = synthetic_clip.write(tmp_path / "mobileclip_s0.pt", tensors)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    for word in (missing, transposed, "text_encoder.surprise"):
        assert word in str(caught.value)


def test_paths_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "none.pt", "no such file"),
        (tmp_path / "a.txt", "is not a .safetensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(path)
    with pytest.raises(CheckpointError, match=r"has no .safetensors, .bin or .pt"):
        load(tmp_path / "empty", variant="MobileCLIP-S0")
    for name in ("a.pt", "b.pt"):
        (tmp_path / "empty" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the path of one"):
        load(tmp_path / "empty", variant="MobileCLIP-S0")
