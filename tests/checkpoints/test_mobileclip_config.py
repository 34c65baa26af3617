"""Variant and config of a MobileCLIP checkpoint, by its name and its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic_clip
from synthetic_clip import tiny_config, tiny_shapes, values

from mlx_mobileclip import ConfigError, load
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.checkpoints.published_names import published_variant
from mlx_mobileclip.models.variants import VARIANTS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: tiny_config(name) for name in VARIANTS}
    monkeypatch.setattr(mobileclip, "VARIANTS", small)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("./models/MobileCLIP2-S0", "MobileCLIP2-S0"),  # a directory
        ("~/models/MobileCLIP2-S0", "MobileCLIP2-S0"),
        ("models/MobileCLIP2-S0", None),  # like a repository of an unknown owner
        ("models/mobileclip2_s0.pt", "MobileCLIP2-S0"),
    ],
)
def test_variant_of_paths_and_repositories(name: str, variant: str | None) -> None:
    assert published_variant(name) == variant


@pytest.mark.usefixtures("tiny")
def test_hidden_files_of_macos_are_ignored(tmp_path: Path) -> None:
    tensors = values(tiny_shapes("MobileCLIP2-S0", "open_clip"))
    path = synthetic_clip.write(tmp_path / "mobileclip2_s0.pt", tensors)
    path.with_name("._mobileclip2_s0.pt").write_bytes(b"\x00\x05\x16\x07")
    assert load(tmp_path)[0].config.variant == "MobileCLIP2-S0"


def load_with_image_size(tmp_path: Path, variant: str, image_size: int) -> Any:
    tensors = values(tiny_shapes(variant, "open_clip"))
    folder = tmp_path / variant
    synthetic_clip.write(folder / "open_clip_model.safetensors", tensors)
    config = {"model_cfg": {"vision_cfg": {"image_size": image_size}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return load(folder)


@pytest.mark.usefixtures("tiny")
def test_stated_image_size_is_used(tmp_path: Path) -> None:
    _, processor = load_with_image_size(tmp_path, "MobileCLIP2-S0", 128)
    assert processor.preprocess.image_size == 128


@pytest.mark.usefixtures("tiny")
def test_vit_refuses_other_image_sizes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size: 1000 is not the"):
        load_with_image_size(tmp_path, "MobileCLIP2-B", 1000)


@pytest.mark.usefixtures("tiny")
def test_logit_scale_is_kept_exact(tmp_path: Path) -> None:
    tensors = values(tiny_shapes("MobileCLIP2-S0", "open_clip"))
    path = synthetic_clip.write(tmp_path / "mobileclip2_s0.pt", tensors)
    model, _ = load(path, dtype="bfloat16")
    assert model.logit_scale is not None
    assert model.logit_scale.item() == tensors["logit_scale"].astype("float32")
