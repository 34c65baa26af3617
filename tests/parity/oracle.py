"""The reference: transformers' FastVLM on CPU PyTorch, with the same synthetic weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import synthetic

# PyPI's torchvision for Linux is built for CUDA, so its operators do not load with a CPU build of
# torch. Its Python modules can be imported if `register_fake` does nothing.
with mock.patch("torch.library.register_fake", lambda *_, **__: lambda function: function):
    import torch
    import torchvision  # noqa: F401

import timm
from transformers import FastVlmConfig, FastVlmForConditionalGeneration

IMAGE_ID = 151646


def fast_vlm(tensors: synthetic.Tensors, size: str) -> Any:
    """The whole model, from weights with Apple's names."""
    config = synthetic.transformers_config(size)
    config.pop("model_type")
    if size == "tiny":
        config["image_token_index"] = config["text_config"]["vocab_size"] - 1
    with torch.device("meta"):
        model = FastVlmForConditionalGeneration(FastVlmConfig(**config))
    named = synthetic.renamed(tensors, synthetic.transformers_name)
    state = {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in named.items()}
    state |= {key: torch.zeros((), dtype=torch.int64) for key in counters(model)}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # Rotary frequencies are not weights; compute them on the CPU, as "meta" has none.
    rotary = model.model.language_model.rotary_emb
    text = model.config.text_config
    model.model.language_model.rotary_emb = type(rotary)(text)
    return model.eval()


def counters(model: Any) -> list[str]:
    """BatchNorm's step counters, which the synthetic checkpoints leave out."""
    return [key for key in model.state_dict() if key.endswith("num_batches_tracked")]


def tower(tensors: synthetic.Tensors, **options: Any) -> Any:
    """timm's trunk, fused or with all branches, from weights with Apple's names."""
    model = timm.create_model("fastvit_mci3", num_classes=0, global_pool="", **options)
    prefix = synthetic.TOWER
    named = synthetic.renamed(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
        synthetic.timm_name,
    )
    state = {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in named.items()}
    state |= {key: torch.zeros((), dtype=torch.int64) for key in counters(model)}
    model.load_state_dict(state, strict=True)
    return model.eval()


@contextmanager
def recorded(modules: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    """Outputs of the modules during the block, by name; feature maps as NHWC."""
    outputs: dict[str, np.ndarray] = {}

    def hook(name: str) -> Any:
        def record(_: Any, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            value = output.detach().numpy()
            outputs[name] = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def tower_modules(trunk: Any) -> dict[str, Any]:
    """The stages of timm's trunk, by our names."""
    stages = {f"stages.{i}": stage for i, stage in enumerate(trunk.stages)}
    return {"stem": trunk.stem, **stages, "final_conv": trunk.final_conv}


def nchw(pixels: Any) -> Any:
    """NHWC pixels as an NCHW torch tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.array(pixels).transpose(0, 3, 1, 2)))


def ids(input_ids: Any, image_id: int = IMAGE_ID) -> Any:
    """Our ids, with the image token of the reference."""
    values = np.array(input_ids).astype(np.int64)
    return torch.from_numpy(np.where(values < 0, image_id, values))[None]
