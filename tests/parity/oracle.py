"""The reference: transformers' FastVLM on CPU PyTorch, given the same synthetic weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import synthetic

# PyPI has no CPU build of torchvision for Linux; without its compiled operators its Python part
# still imports, once it is kept from describing them to torch.
with mock.patch("torch.library.register_fake", lambda *_, **__: lambda function: function):
    import torch
    import torchvision  # noqa: F401

import timm
from transformers import FastVlmConfig, FastVlmForConditionalGeneration

IMAGE_ID = 151646


def fast_vlm(tensors: synthetic.Tensors, size: str) -> Any:
    """The whole model with weights given in Apple's names."""
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
    # Rotary frequencies are no weights: compute on the CPU what "meta" left out.
    rotary = model.model.language_model.rotary_emb
    text = model.config.text_config
    model.model.language_model.rotary_emb = type(rotary)(text)
    return model.eval()


def counters(model: Any) -> list[str]:
    """BatchNorm's step counters, which the synthetic checkpoints leave out."""
    return [key for key in model.state_dict() if key.endswith("num_batches_tracked")]


def tower(tensors: synthetic.Tensors, **options: Any) -> Any:
    """timm's trunk with weights given in Apple's names, fused or with all its branches."""
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
        def keep(_: Any, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            value = output.detach().numpy()
            outputs[name] = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value

        return keep

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
    """NHWC pixels of ours as a torch tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.array(pixels).transpose(0, 3, 1, 2)))


def ids(input_ids: Any, image_id: int = IMAGE_ID) -> Any:
    """Ids of ours, with the reference's image placeholder."""
    values = np.array(input_ids).astype(np.int64)
    return torch.from_numpy(np.where(values < 0, image_id, values))[None]
