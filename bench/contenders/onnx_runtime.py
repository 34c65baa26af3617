"""ONNX Runtime with open_clip's MobileCLIP, reparameterised and exported by PyTorch."""

import gc
import os
import tempfile
import warnings
from pathlib import Path

import onnxruntime
import torch

from ..cases import Case
from . import Repeat
from .open_clip import load


class Tower(torch.nn.Module):
    """One tower as a module with a forward pass of its own, as the exporter wants it."""

    def __init__(self, model: torch.nn.Module, tower: str):
        super().__init__()
        self.model = model
        self.encode = model.encode_image if tower == "image" else model.encode_text

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x)


def prepare(case: Case, checkpoint: Path) -> Repeat:
    """Export on the CPU; ONNX Runtime computes on the CPU in float32."""
    if case.gpu or case.dtype != "float32":
        raise SystemExit("compared on the CPU in float32 only")
    model, images, texts = load(case, checkpoint)
    example = images if case.work == "image" else texts
    values = example.numpy()
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(directory) / "tower.onnx"
        torch.onnx.export(Tower(model, case.work), (example,), path, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    del model, images, texts, example
    gc.collect()
    name = session.get_inputs()[0].name
    return lambda _: lambda: session.run(None, {name: values})
