"""Convert a FastVLM to the layout of mlx-vlm or transformers.

Source of the configs: mlx-vlm 0.7.10 `models/fastvlm`, transformers 5.23 `models/fast_vlm` and
`models/llava/processing_llava.py`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.checkpoints.layouts import FASTVLM_LAYOUTS, source_name
from mlx_fastvlm.models.config import FastVLMConfig
from mlx_fastvlm.preprocess.chat_format import SYSTEM_PROMPT
from mlx_fastvlm.preprocess.tokenizer import FLAGS, TEXT_END, TURN_END, Tokenizer
from mlx_mobileclip.checkpoints.layout import Layout
from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.quantization import QuantizedLayers, quantization_entry

from ..write import write_json
from .unfold import source_paths, unfold

TARGETS = {"mlx-vlm": "mlx-vlm", "transformers": "fast_vlm"}  # name of each runtime's layout
IMAGE_TOKEN = "<image>"  # in the text of a prompt; both runtimes replace it by the image
IMAGE_TOKEN_ID = 151646  # in transformers: an unused row of Qwen2's vocabulary
HEAD_WIDTH = 768  # width of the classification head that mlx-vlm requires
EXTRA_ROWS = 64  # added to a vocabulary that has no unused row for IMAGE_TOKEN
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    + SYSTEM_PROMPT
    + "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def check_quantization(target: str, quantized: QuantizedLayers) -> None:
    """Check that a layout can hold quantised layers.

    Args:
        target: One of TARGETS.
        quantized: Quantisation of each quantised layer.

    Raises:
        ConfigError: it cannot.
    """
    if quantized and target == "transformers":
        raise ConfigError(
            "transformers cannot load weights quantised by MLX; leave out -q, or --dequantize"
        )
    if any(path.startswith("vision_tower.") for path in quantized):
        raise ConfigError("mlx-vlm cannot load a quantised image tower; leave it out of --q-parts")


def check_image_mode(target: str, mode: str) -> None:
    """Check that a runtime supports the image mode of the checkpoint.

    Args:
        target: One of TARGETS.
        mode: The checkpoint's `image_mode`.

    Raises:
        ConfigError: it does not.
    """
    if target == "mlx-vlm" and mode != "pad":
        raise ConfigError(
            f"mlx-vlm pads every image to a square, but this checkpoint has image mode {mode!r}, "
            "so its answers would differ there; use --layout transformers, or leave --layout out"
        )


def to_layout(
    config: FastVLMConfig, tensors: Tensors, target: str, tokenizer: Tokenizer
) -> tuple[dict[str, Any], Tensors]:
    """Convert a canonical checkpoint to the layout of another runtime.

    Args:
        config: Config of the canonical checkpoint.
        tensors: Its lazy tensors.
        target: One of TARGETS.
        tokenizer: Its tokenizer.

    Returns:
        Contents of config.json, and lazy tensors.

    Raises:
        ConfigError: the layout cannot hold the quantised layers.
    """
    check_quantization(target, config.quantization)
    layout = next(layout for layout in FASTVLM_LAYOUTS if layout.name == TARGETS[target])
    name = source_name(layout, config.vision, config.projector_type)
    common = unfold(config, tensors)
    rows = config.text.vocab_size
    if target == "transformers" and image_token_id(config, tokenizer) >= rows:
        rows += EXTRA_ROWS
        for key in {"model.embed_tokens.weight", "lm_head.weight"} & common.keys():
            table = common[key]
            empty = mx.zeros((EXTRA_ROWS, table.shape[1]), table.dtype)
            common[key] = mx.concatenate([table, empty])
    renamed = {name(key): _with_axes(layout, key, value) for key, value in common.items()}
    renamed |= _unused_tensors(config, target, renamed)
    ends = {"eos_token_id": end_ids(tokenizer)}
    text = asdict(config.text) | {"vocab_size": rows, "hidden_act": "silu"} | ends
    if target == "transformers":
        return _transformers_config(config, text, image_token_id(config, tokenizer)), renamed
    return _mlx_vlm_config(config, text) | _quantization_entry(config, name), renamed


def _unused_tensors(config: FastVLMConfig, target: str, tensors: Tensors) -> Tensors:
    """Tensors that the runtime does not use, but that it warns about or requires."""
    if target == "transformers":
        counter = ".num_batches_tracked"
        norms = [name for name in tensors if name.endswith(".running_var")]
        return {name.replace(".running_var", counter): mx.array(0, mx.int64) for name in norms}
    head = mx.zeros((config.vision.features, HEAD_WIDTH), mx.float16)
    return {"vision_tower.vision_model.head.proj": head}


def image_token_id(config: FastVLMConfig, tokenizer: Tokenizer) -> int:
    """Id of IMAGE_TOKEN in transformers' layout: the tokenizer's, or an unused one."""
    if IMAGE_TOKEN in tokenizer.added:
        return tokenizer.added[IMAGE_TOKEN]
    unused = tokenizer.size <= IMAGE_TOKEN_ID < config.text.vocab_size
    return IMAGE_TOKEN_ID if unused else tokenizer.size


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer, end of turn first."""
    return [tokenizer.added[t] for t in (TURN_END, TEXT_END) if t in tokenizer.added]


def _with_axes(layout: Layout, common: str, tensor: mx.array) -> mx.array:
    """Put convolutions and layer scales in the layout's order of axes."""
    if not layout.nhwc or not common.startswith("vision."):
        return tensor
    if tensor.ndim == 4:
        return tensor.transpose(0, 2, 3, 1)
    return tensor.reshape(1, 1, -1) if "layer_scale" in common else tensor


def _tower_shape(config: FastVLMConfig) -> dict[str, Any]:
    values = config.vision.to_json()
    return {key: values[key] for key in ("layers", "embed_dims", "mlp_ratios")}


def _mlx_vlm_config(config: FastVLMConfig, text: dict[str, Any]) -> dict[str, Any]:
    return text | {
        "model_type": "llava_qwen2",
        "architectures": ["LlavaQwen2ForCausalLM"],
        "image_aspect_ratio": "pad",
        "image_token_index": -200,
        "mm_hidden_size": config.vision.features,
        "mm_projector_type": config.projector_type,
        "mm_vision_tower": f"mobileclip_l_{config.image_size}",
        "tokenizer_model_max_length": config.max_length,
        "vision_config": {"image_size": config.image_size} | _tower_shape(config),
    }


def _quantization_entry(config: FastVLMConfig, name: Callable[[str], str]) -> dict[str, Any]:
    """The `quantization` entry, with the layout's names of layers."""
    if not config.quantization:
        return {}
    layers = {
        name(f"{part}.weight").removesuffix(".weight"): quantization
        for path, quantization in config.quantization.items()
        for part in source_paths(path)
    }
    return {"quantization": quantization_entry(layers)}


def _transformers_config(
    config: FastVLMConfig, text: dict[str, Any], image_token: int
) -> dict[str, Any]:
    theta = text.pop("rope_theta")
    tied = text["tie_word_embeddings"]
    return {
        "model_type": "fast_vlm",
        "architectures": ["FastVlmForConditionalGeneration"],
        "image_token_index": image_token,
        "image_seq_length": (config.image_size // config.vision.stride) ** 2,
        "tie_word_embeddings": tied,
        "text_config": text
        | {
            "model_type": "qwen2",
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        },
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": config.vision.features,
            "model_args": {"inference_mode": True} | _tower_shape(config),
        },
    }


def write_tokenizer(
    directory: Path, config: FastVLMConfig, target: str, tokenizer: Tokenizer
) -> None:
    """Write the files for tokenizer, preprocessing and generation.

    Args:
        directory: Directory to write to.
        config: Config of the canonical checkpoint.
        target: One of TARGETS.
        tokenizer: Tokenizer of the checkpoint.
    """
    path = directory / "tokenizer.json"
    tokenizer.save(path)
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": TURN_END,
        "pad_token": TEXT_END if TEXT_END in tokenizer.added else TURN_END,
        "model_max_length": config.max_length,
    }
    if target == "transformers":
        if IMAGE_TOKEN not in tokenizer.added:
            data = json.loads(path.read_text(encoding="utf-8"))
            flags = dict.fromkeys(FLAGS, False) | {"special": True}
            image = {"id": image_token_id(config, tokenizer), "content": IMAGE_TOKEN, **flags}
            data["added_tokens"].append(image)
            path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        tokenizer_config["extra_special_tokens"] = {"image_token": IMAGE_TOKEN}
        processor_config = {
            "processor_class": "LlavaProcessor",
            "patch_size": config.vision.stride,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
            "image_token": IMAGE_TOKEN,
        }
        write_json(directory / "processor_config.json", processor_config)
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    ends = end_ids(tokenizer)
    generation_config = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[-1]}
    write_json(directory / "generation_config.json", generation_config)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    side = config.image_size
    image_processor = {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_pad": config.image_mode == "pad",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    write_json(directory / "preprocessor_config.json", image_processor)
