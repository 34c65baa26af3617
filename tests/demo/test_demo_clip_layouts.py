"""The MobileCLIP demo model in open_clip's and timm's layouts equals the canonical one.

Apple's layout cannot hold it, for lack of a bias of the image projection.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import synthetic_clip
from questions import description
from world import HELD_OUT, render, scene

from convert.export.unfold import unfold_tower
from mlx_mobileclip import MobileCLIP, Processor, load
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.checkpoints.hub import DEMO_DIRECTORY
from mlx_mobileclip.checkpoints.weights import named_parameters

VARIANT = "MobileCLIP2-S3"  # variant that is replaced by the demo's config
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "demo.pt")
SCENES = [scene(HELD_OUT + i, central=True) for i in range(5)]
LAYER_NAMES = {"norm1": "ln_1", "norm2": "ln_2", "proj": "attn.out_proj", "qkv": "attn.in_proj"}
LAYER_NAMES |= {"fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
TEXT_NAMES = {"embedding.weight": "token_embedding.weight", "positions": "positional_embedding"}


@pytest.fixture(scope="module")
def demo() -> tuple[MobileCLIP, Processor]:
    return load("demo", dtype="float32")


@pytest.fixture(autouse=True)
def as_published(demo: tuple[MobileCLIP, Processor], monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(demo[0].config, variant=VARIANT)
    monkeypatch.setattr(mobileclip, "VARIANTS", {VARIANT: config})


def trunk(model: MobileCLIP) -> dict[str, mx.array]:
    """Image tower and projection, with timm's names."""
    tensors, start = named_parameters(model), "image.trunk."
    folded = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    unfolded = unfold_tower(folded)
    kinds = ("weight", "bias")
    return unfolded | {f"head.fc.{kind}": tensors[f"image.projection.{kind}"] for kind in kinds}


def open_clip(model: MobileCLIP) -> dict[str, np.ndarray]:
    """The tensors of both towers, with open_clip's names."""
    out = {f"visual.trunk.{name}": tensor for name, tensor in trunk(model).items()}
    for name, tensor in named_parameters(model).items():
        key = name.removeprefix("text.")
        if key == name:
            continue
        if key.startswith("layers."):
            _, i, part, kind = key.split(".")
            separator = "_" if part == "qkv" else "."
            out[f"text.transformer.resblocks.{i}.{LAYER_NAMES[part]}{separator}{kind}"] = tensor
        elif key == "projection.weight":
            out["text.text_projection"] = tensor.T
        else:
            out[f"text.{TEXT_NAMES.get(key, key.replace('norm.', 'ln_final.'))}"] = tensor
    return {name: np.array(tensor) for name, tensor in out.items()} | {
        "logit_scale": np.array(model.logit_scale)
    }


@pytest.mark.parametrize("file", FILES)
def test_open_clip(file: str, demo: tuple[MobileCLIP, Processor], tmp_path: Path) -> None:
    """Tensors and similarities are bit-equal."""
    path = synthetic_clip.write(tmp_path / file, open_clip(demo[0]))
    shutil.copyfile(DEMO_DIRECTORY / "merges.txt", tmp_path / "merges.txt")
    model, processor = load(tmp_path, variant=VARIANT, dtype="float32")
    assert path.is_file()
    theirs, ours = named_parameters(demo[0]), named_parameters(model)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in theirs)
    images, texts = [render(s) for s in SCENES], [description(s) for s in SCENES]
    found = (
        model.encode_image(processor.images(images)) @ model.encode_text(processor.texts(texts)).T
    )
    own = demo[1]
    expected = demo[0].encode_image(own.images(images)) @ demo[0].encode_text(own.texts(texts)).T
    assert mx.array_equal(found, expected).item()


def test_timm(demo: tuple[MobileCLIP, Processor], tmp_path: Path) -> None:
    """The image tower alone."""
    tensors = {name: np.array(tensor) for name, tensor in trunk(demo[0]).items()}
    synthetic_clip.write(tmp_path / "model.safetensors", tensors)
    model, processor = load(tmp_path, variant=VARIANT, dtype="float32")
    assert model.text is None
    pixels = processor.images([render(shown) for shown in SCENES])
    assert mx.array_equal(model.encode_image(pixels), demo[0].encode_image(pixels)).item()
