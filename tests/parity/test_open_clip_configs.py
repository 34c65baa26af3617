"""Each field of open_clip's configs, changed alone, acts as in open_clip or is refused."""

import inspect
import json
import warnings
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mlx_mobileclip import CheckpointError, ConfigError, load
from mlx_mobileclip.preprocess.tokenizer import clip_tokenizer

import open_clip  # isort: skip (after oracle, which makes torchvision importable)
import timm  # isort: skip
from timm.models._hub import save_config_for_hf  # isort: skip
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP  # isort: skip
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict  # isort: skip

assert oracle
pytestmark = pytest.mark.parity
TOWER = open_clip.model._build_vision_tower

TEXTS = ["a photo of a cat", "Two dogs & a 3rd one", ""]
ABSENT = object()
# A second value for each field whose default does not suggest one.
OTHER: dict[str, list[Any]] = {
    "pool_type": ["first", "last", "eos", "none"],
    "eos_id": [49407],
    "act_kwargs": [{"approximate": "tanh"}, {}],
    "norm_kwargs": [{"eps": 1e-3}, {"eps": 1e-5}],
    "block_type": ["custom", "default"],
    "proj_type": ["none"],
    "ls_init_value": [0.1],
    "tokenizer_kwargs": [{"clean": "canonicalize"}, {"clean": "whitespace"}, {"clean": "lower"}],
    "tokenizer_mode": ["clips"],
    "hf_tokenizer_name": ["openai/clip-vit-large-patch14"],
    "hf_model_name": ["roberta-base"],
    "timm_model_name": ["fastvit_mci1", "fastvit_t8", "fastvit_mci0.apple_mclip"],
    "timm_pool": ["max", "", "abs_attn"],
    "timm_proj": ["linear", "mlp", "none", ""],
    "image_size": [320, [256, 256], [320, 320], [256, 128]],
    "width": [128],
    "heads": [4, 1],
    "layers": [3],
    "context_length": [32],
    "vocab_size": [49500],
    "interpolation": ["bicubic", "nearest"],
    "resize_mode": ["longest", "squash"],
    "mean": [[0.1, 0.2, 0.3]],
    "std": [[0.5, 0.6, 0.7]],
    "size": [256, 320],
    "mode": ["BGR"],
}


def published() -> dict[str, Any]:
    """The config of MobileCLIP2-S0 with a small text tower."""
    model = open_clip.get_model_config("MobileCLIP2-S0")
    model["embed_dim"] = 64
    model["text_cfg"] |= {"width": 64, "layers": 2, "heads": 2}
    preprocess = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
    return {"model_cfg": model, "preprocess_cfg": preprocess | {"resize_mode": "shortest"}}


def changes() -> list[tuple[tuple[str, ...], Any]]:
    """Every field of every section: another value, and its absence where it is stated."""
    root = {
        name: p.default
        for name, p in inspect.signature(CustomTextCLIP).parameters.items()
        if name not in ("vision_cfg", "text_cfg", "cast_dtype")
    }
    sections: list[tuple[tuple[str, ...], dict[str, Any]]] = [(("model_cfg",), root)]
    for name, kind in (("text_cfg", CLIPTextCfg), ("vision_cfg", CLIPVisionCfg)):
        defaults = {f.name: f.default for f in fields(kind)}
        sections.append((("model_cfg", name), defaults))
    sections.append((("preprocess_cfg",), {f.name: f.default for f in fields(PreprocessCfg)}))
    result: list[tuple[tuple[str, ...], Any]] = [((), None), (("preprocess_cfg",), ABSENT)]
    for path, defaults in sections:
        stated: Any = published()
        for key in path:
            stated = stated[key]
        for key, default in defaults.items():
            place = (*path, key)
            values = OTHER.get(key)
            if path == ("model_cfg", "vision_cfg") and key in ("pool_type", "width", "layers"):
                values = values[:1] if values else values
            if values is None:
                now = stated.get(key, default)
                if isinstance(now, bool):
                    values = [not now]
                elif isinstance(now, (int, float)):
                    values = [now * 2 + 1]
                else:
                    values = ["other" if isinstance(now, str) else 1.0]
            result += [(place, value) for value in values]
            if key in stated:
                result.append((place, ABSENT))
        result.append(((*path, "surprise"), 1))
    return result


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    config = published()
    if path:
        place = config
        for key in path[:-1]:
            place = place[key]
        if value is ABSENT:
            place.pop(path[-1])
        else:
            place[path[-1]] = value
    return config


def theirs(config: dict[str, Any]) -> tuple[Any, Any, Any]:
    """open_clip's model, image transform and tokenizer, as its factory builds them."""
    model_cfg = json.loads(json.dumps(config["model_cfg"]))
    custom = model_cfg.pop("custom_text", False) or "hf_model_name" in model_cfg["text_cfg"]
    kind: Any = CustomTextCLIP if custom else CLIP
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(**model_cfg).eval()
    stated = merge_preprocess_dict(PreprocessCfg(), config.get("preprocess_cfg", {}))
    stated["size"] = model.visual.image_size
    transform = image_transform_v2(PreprocessCfg(**stated), is_train=False)
    text = model_cfg["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(
        context_length=text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})
    )
    return model, transform, tokenizer


def close(found: mx.array, expected: torch.Tensor) -> bool:
    a, b = np.asarray(found), expected.numpy()
    return a.shape == b.shape and float(np.abs(a - b).max()) <= 1e-4 * float(np.abs(b).max())


@cache
def _tower(embed_dim: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TOWER(embed_dim, published()["model_cfg"]["vision_cfg"])


def cached_tower(embed_dim: int, *_: Any) -> Any:
    """The published image tower, built once."""
    return _tower(embed_dim)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((400, 290), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("path", "value"),
    changes(),
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else "absent" if x is ABSENT else str(x),
)
def test_changed_field_acts_as_in_open_clip_or_is_refused(
    path: tuple[str, ...],
    value: Any,
    tmp_path: Path,
    picture: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = changed(path, value)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    weights = tmp_path / "open_clip_model.safetensors"
    weights.touch()
    try:
        load(tmp_path)
    except ConfigError as error:  # before any weights are read
        assert path and path[-1].partition("_cfg")[0] in str(error), error
        return
    except CheckpointError:
        pass  # the config was accepted; then reading the empty weights failed
    build = cached_tower if "vision_cfg" not in path else open_clip.model._build_vision_tower
    monkeypatch.setattr(open_clip.model, "_build_vision_tower", build)
    try:
        model, transform, tokenizer = theirs(config)
    except Exception:  # noqa: BLE001 (open_clip asserts, raises and downloads)
        return  # it has no answer that ours could differ from
    save_file({k: t.contiguous() for k, t in model.state_dict().items()}, weights)
    ours, processor = load(tmp_path, dtype="float32")
    with torch.no_grad():
        expected = model.encode_text(tokenizer(TEXTS))
        assert close(ours.encode_text(processor.texts(TEXTS)), expected)
        expected = model.encode_image(transform(picture)[None])
        assert close(ours.encode_image(processor.images([picture])), expected)


@pytest.mark.parametrize(
    ("name", "size"), [("fastvit_mci0.apple_mclip2_dfndr2b", None), ("fastvit_mci0", 320)]
)
def test_timm_config_is_read(name: str, size: int | None, tmp_path: Path) -> None:
    """Files of timm 1.0.31 and later have the arguments that the tower was built with."""
    model = timm.create_model(name, pretrained=False)
    stated = {"input_size": (3, size, size), "crop_pct": 1.0, "interpolation": "bilinear"}
    save_config_for_hf(model, str(tmp_path / "config.json"), data_config=size and stated)
    assert "in_chans" in json.loads((tmp_path / "config.json").read_text())["model_args"]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ours, processor = load(tmp_path, dtype="float32")
    assert processor.preprocess.image_size == (size or 256)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(pixels)
    assert close(ours.encode_image(mx.array(pixels.permute(0, 2, 3, 1).numpy())), expected)


def test_comparison_detects_a_difference(tmp_path: Path) -> None:
    """A field that is refused would have given wrong embeddings."""
    base, other = theirs(published())[0], theirs(changed(("model_cfg", "quick_gelu"), True))[0]
    other.load_state_dict(base.state_dict())
    ids = torch.from_numpy(clip_tokenizer()(TEXTS).astype(np.int64))
    with torch.no_grad():
        assert not close(mx.array(base.encode_text(ids).numpy()), other.encode_text(ids))
