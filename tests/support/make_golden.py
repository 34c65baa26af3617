"""Write golden/*.safetensors from PyTorch: `python tests/support/make_golden.py`.

Needs the parity extra. The weights are those of synthetic.py, which depend on names alone, so
the files hold outputs only.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "parity")]

import synthetic  # noqa: E402

SCHEMA = "1"
COMMAND = "python tests/support/make_golden.py"
PIXELS = 128  # side length; 4 embeddings per image
IDS = [5, 6, 7, -200, -200, -200, -200, 8, 9, -200, -200, -200, -200, 10]


def pixels() -> np.ndarray:
    """Two random images, NHWC, the input of both models."""
    return synthetic.tensor("pixels", (2, PIXELS, PIXELS, 3))


def main() -> None:
    import oracle

    torch = oracle.torch
    metadata = {
        "schema": SCHEMA,
        "command": COMMAND,
        "versions": f"torch {torch.__version__}, timm {oracle.timm.__version__}",
    }

    def save(name: str, outputs: dict[str, Any]) -> None:
        arrays = {key: np.ascontiguousarray(value) for key, value in outputs.items()}
        save_file(arrays, HERE / "golden" / f"{name}.safetensors", metadata)

    model = oracle.fast_vlm(synthetic.apple_tensors(), "tiny")
    ids = oracle.ids(np.array(IDS), model.config.image_token_index)
    modules = oracle.tower_modules(model.model.vision_tower.timm_model)
    modules |= {f"layers.{i}": m for i, m in enumerate(model.model.language_model.layers)}
    modules["projector"] = model.model.multi_modal_projector
    with oracle.recorded(modules) as outputs, torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=oracle.nchw(pixels())).logits
    outputs["logits"] = logits.numpy()
    save("fastvlm_tiny", outputs)

    shape = {"layers": synthetic.TINY_LAYERS, "embed_dims": synthetic.TINY_DIMS}
    trunk = oracle.tower(synthetic.apple_tensors(unfused=True), inference_mode=False, **shape)
    with oracle.recorded(oracle.tower_modules(trunk)) as outputs, torch.inference_mode():
        trunk.forward_features(oracle.nchw(pixels()))
    save("fastvit_unfused_tiny", outputs)


if __name__ == "__main__":
    main()
