"""Random FastVLM checkpoints of any size, in every layout, without torch.

Names and shapes come from the listings in keys/, which were taken from the reference
classes. The name maps between layouts are written independently of the converter's, from Apple's
names to the others, to check them.
"""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Tensors = dict[str, Array]

KEYS = Path(__file__).parent / "keys"
TOWER = "model.vision_tower.vision_tower.model."
TINY_DEPTH = 2  # decoder layers
TINY_LAYERS = (1, 2, 1, 1, 2)  # blocks in each stage of the tower
TINY_DIMS = (8, 16, 32, 64, 128)
TINY_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": TINY_DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 384,
}
IMAGE_PROCESSOR = {  # preprocessor_config.json of transformers, for 256 px
    "image_processor_type": "LlavaImageProcessorFast",
    "do_pad": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 256, "width": 256},
}
FULL_TEXT = {
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


# Names and shapes.


def read_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Read a listing of keys/: tensor names to shapes."""
    shapes = {}
    for line in (KEYS / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            key, shape = line.split("\t")[:2]
            shapes[key] = tuple(json.loads(shape))
    return shapes


def tiny(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shrink a 0.5B listing: widths of the tower by 12, fewer blocks, a small decoder."""
    text = {896: 64, 128: 32, 4864: 96, 151936: 384, 3072: 256}
    blocks = dict(zip((0, 2, 4, 7, 10), TINY_LAYERS, strict=True))
    result = {}
    for key, shape in shapes.items():
        tower = "network" in key or "conv_exp" in key or "patch_embed" in key or "head" in key
        block = re.search(r"network\.(0|2|4|7|10)\.(\d+)\.", key)
        layer = re.search(r"\.layers\.(\d+)\.", key)
        if block and int(block[2]) >= blocks[int(block[1])]:
            continue
        if layer and int(layer[1]) >= TINY_DEPTH:
            continue
        if tower and "lm_head" not in key:
            result[key] = tuple(n // 12 if n >= 96 else n for n in shape)
        else:
            result[key] = tuple(text[n] for n in shape)
    return result


# Values depend on the names alone, so that torch and this module agree without files.


def tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """A random tensor as training might leave it: BatchNorm, biases and scales non-trivial."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
    unit = rng.random(shape, dtype=np.float32)  # [0, 1)
    if name.endswith("running_var"):
        return 0.5 + unit
    if name.endswith(("bn.weight", "rbr_skip.weight", "norm.weight", "layernorm.weight")):
        return 0.75 + 0.5 * unit
    if "layer_scale" in name:
        return 0.1 + 0.2 * unit
    if len(shape) < 2:
        return 0.2 * (unit - 0.5)
    if "embed_tokens" in name or "lm_head" in name:
        return 0.2 * (unit - 0.5)
    fan_in = int(np.prod(shape[1:]))
    return (unit - 0.5) * np.float32(2 * (3 / fan_in) ** 0.5)


def apple_tensors(
    size: str = "tiny", *, unfused: bool = False, lm_head: str = "tied", seed: int = 0
) -> Tensors:
    """A checkpoint with Apple's names; `lm_head` is "tied" (equal), "differs" or "absent"."""
    shapes = read_keys(f"apple_llava_qwen2_{'0.5b' if size == 'tiny' else size}")
    if unfused:
        shapes = {k: s for k, s in shapes.items() if not k.startswith(TOWER)}
        shapes |= {TOWER + k: s for k, s in read_keys("fastvithd_apple_unfused").items()}
    if size == "tiny":
        shapes = tiny(shapes)
    if lm_head == "absent":
        del shapes["lm_head.weight"]
    result: Tensors = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        result[name] = tensor(name, shape, seed)
    if lm_head == "tied" and size != "7b":
        result["lm_head.weight"] = result["model.embed_tokens.weight"]
    return result


# Apple's names to the other layouts'.

_STAGE = {0: 0, 1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 3, 8: 4, 9: 4, 10: 4}
_KIND = dict.fromkeys((0, 2, 4, 7, 10), "blocks") | dict.fromkeys((1, 3, 5, 8), "downsample")
_KIND |= dict.fromkeys((6, 9), "pos_emb")


def timm_name(key: str) -> str | None:
    """Apple's name of a tower tensor, without prefix, to timm's; None for the dropped head."""
    if key == "head.proj":
        return None
    for old, new in (
        ("patch_embed.", "stem."),
        ("conv_exp.", "final_conv."),
        ("convffn.", "mlp."),
        ("lkb_reparam", "reparam_conv"),
        ("lkb_origin", "large_conv"),
        (".se.reduce.", ".se.fc1."),
        (".se.expand.", ".se.fc2."),
        ("rbr_conv", "conv_kxk"),
        ("rbr_scale", "conv_scale"),
        ("rbr_skip", "identity"),
    ):
        key = key.replace(old, new)
    key = re.sub(r"(layer_scale(_\d)?)$", r"\1.gamma", key)
    found = re.match(r"network\.(\d+)\.(.*)", key)
    if found:
        kind = _KIND[int(found[1])]
        rest = found[2].replace("pe.", "pos_enc.") if kind == "pos_emb" else found[2]
        key = f"stages.{_STAGE[int(found[1])]}.{kind}.{rest}"
    return key


def transformers_name(key: str) -> str | None:
    """Apple's name to that of transformers' fast_vlm."""
    if key.startswith(TOWER):
        name = timm_name(key[len(TOWER) :])
        return name and f"model.vision_tower.timm_model.{name}"
    if key.startswith("lm_head"):
        return key
    key = key.replace("mm_projector.0", "multi_modal_projector.linear_1")
    key = key.replace("mm_projector.2", "multi_modal_projector.linear_2")
    if "projector" in key:
        return key
    return key.replace("model.", "model.language_model.", 1)


def mlx_vlm_name(key: str) -> str | None:
    """Apple's name to mlx-vlm's, which has no tied heads."""
    if key.startswith(TOWER):
        rest = key[len(TOWER) :].replace("patch_embed.", "patch_embed.blocks.")
        return f"vision_tower.vision_model.{rest}"
    if key.startswith("model.mm_projector."):
        return key.removeprefix("model.")
    return f"language_model.{key}"


def app_export_name(key: str) -> str | None:
    """Apple's name to that of its app exports, which have no tower and are never tied."""
    if key.startswith(TOWER):
        return None
    if key.startswith("model.mm_projector."):
        return key.replace("model.mm_projector.", "multi_modal_projector.linear_")
    return f"language_model.{key}"


def renamed(tensors: Tensors, name: Callable[[str], str | None]) -> Tensors:
    return {new: value for key, value in tensors.items() if (new := name(key))}


def mlx_layout(key: str, value: Array) -> Array:
    """mlx-vlm stores convolutions NHWC and layer scales (1, 1, C)."""
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(0, 2, 3, 1))
    return value.reshape(1, 1, -1) if "layer_scale" in key else value


# Config and tokenizer.


def apple_config(size: str = "tiny", image_size: int = 256, **changes: Any) -> dict[str, Any]:
    text = dict(TINY_TEXT) if size == "tiny" else dict(FULL_TEXT[size])
    config = {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "max_position_embeddings": 32768,
        "mm_hidden_size": 2 * TINY_DIMS[-1] if size == "tiny" else 3072,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 8192,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        **text,
    }
    if size == "tiny":
        config["vision_config"] = {"layers": list(TINY_LAYERS), "embed_dims": list(TINY_DIMS)}
    return config | changes


def transformers_config(size: str = "tiny", **changes: Any) -> dict[str, Any]:
    text = dict(TINY_TEXT) if size == "tiny" else dict(FULL_TEXT[size])
    model_args: dict[str, Any] = {"inference_mode": True}
    if size == "tiny":
        model_args |= {"layers": list(TINY_LAYERS), "embed_dims": list(TINY_DIMS)}
    return {
        "model_type": "fast_vlm",
        "image_token_index": 151646,
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 256 if size == "tiny" else 3072,
            "model_args": model_args,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
            **text,
        },
        "tie_word_embeddings": text.get("tie_word_embeddings", True),
    } | changes


CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ the", "i n", "a n", "Ġ a", "Ċ Ċ", "e r")


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte value, in byte order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters, extra = [], 0
    for byte in range(256):
        if byte in visible:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + extra))
            extra += 1
    return characters


def tokenizer_tables(size: int = 0) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """Vocabulary of at least 264 and `size` tokens, its merges, and three control tokens."""
    tokens = byte_characters() + [merge.replace(" ", "") for merge in MERGES]
    tokens += [f"Ġfiller{i}" for i in range(len(tokens), size)]
    vocab = {token: i for i, token in enumerate(tokens)}
    added = {token: len(vocab) + i for i, token in enumerate(CONTROL_TOKENS)}
    return vocab, list(MERGES), added


def write_tokenizer(directory: Path, *, split: bool = False, size: int = 0) -> None:
    """tokenizer.json, or `split` the older vocab.json, merges.txt and added_tokens.json."""
    vocab, merges, added = tokenizer_tables(size)
    if split:
        (directory / "vocab.json").write_text(json.dumps(vocab))
        (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (directory / "added_tokens.json").write_text(json.dumps(added))
        return
    entries = [{"id": i, "content": t, "special": True} for t, i in added.items()]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    data = {"version": "1.0", "added_tokens": entries, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(data))


# Whole checkpoints.


def write(
    directory: Path,
    tensors: dict[str, Any],
    config: dict[str, Any],
    *,
    dtype: mx.Dtype = mx.float32,
    shards: int = 1,
    split_tokenizer: bool = False,
    metadata: str = "pt",
) -> Path:
    """Write a checkpoint directory; MLX arrays are written as they are, numpy ones cast."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {
        k: v if isinstance(v, mx.array) else mx.array(v).astype(dtype) for k, v in tensors.items()
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, split=split_tokenizer)
    names = list(arrays)
    if shards == 1:
        path = directory / "model.safetensors"
        mx.save_safetensors(str(path), arrays, metadata={"format": metadata})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        mx.save_safetensors(str(directory / file), {k: arrays[k] for k in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def quantized(tensors: Tensors, options: Callable[[str], dict[str, Any] | None]) -> dict[str, Any]:
    """Quantise the matrices for which `options` returns group_size and bits."""
    result: dict[str, Any] = {}
    for key, value in tensors.items():
        chosen = options(key) if key.endswith(".weight") and value.ndim == 2 else None
        if chosen is None:
            result[key] = value
            continue
        parts = mx.quantize(mx.array(value), **chosen)
        base = key.removesuffix(".weight")
        result |= {
            f"{base}.{n}": p for n, p in zip(("weight", "scales", "biases"), parts, strict=False)
        }
    return result


def write_layout(directory: Path, layout: str, **options: Any) -> Path:
    """Write a tiny checkpoint in a layout; the weights are the same for all layouts."""
    size = options.pop("size", "tiny")
    unfused = options.pop("unfused", False)
    tensors = apple_tensors(size, unfused=unfused)
    if layout == "llava_qwen2":
        return write(directory, tensors, apple_config(size), **options)
    if layout == "fast_vlm":
        tensors = renamed(tensors, transformers_name)
        tensors.pop("lm_head.weight")
        return write(directory, tensors, transformers_config(size), **options)
    if layout == "mlx-vlm":
        tensors = {k: mlx_layout(k, v) for k, v in renamed(tensors, mlx_vlm_name).items()}
        tensors.pop("language_model.lm_head.weight")
        return write(directory, tensors, apple_config(size), metadata="mlx", **options)
    assert layout == "app export"
    tensors = renamed(tensors, app_export_name)
    config = apple_config(size, tie_word_embeddings=False, image_token_index=151646)
    return write(directory, tensors, config, **options)
