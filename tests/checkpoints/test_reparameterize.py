"""Folding passes the CPU stream to every operation and changes no global state."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import synthetic
import synthetic_clip

from mlx_fastvlm.checkpoints.layouts import detect, fastvlm_source
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.checkpoints.reparameterize import fold_fastvit
from mlx_mobileclip.json_fields import Fields
from mlx_mobileclip.models.fastvit import PRESETS, FastViTConfig

OPERATORS = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__",
    "__rtruediv__", "__neg__", "__matmul__", "__pow__", "__getitem__", "__iter__", "T",
)  # fmt: skip
METHODS = ("astype", "reshape", "transpose", "sum", "squeeze", "sqrt", "flatten", "moveaxis")
FUNCTIONS = (
    "pad", "take", "eye", "ones", "arange", "squeeze", "transpose", "reshape", "concatenate",
    "sum", "sqrt", "multiply", "expand_dims", "full",
)  # fmt: skip


def fold(layout: str, unfused: bool = False) -> dict[str, mx.array]:
    tensors: dict[str, Any] = synthetic.apple_tensors(unfused=unfused)
    if layout != "llava_qwen2":
        rename = {"fast_vlm": synthetic.transformers_name, "mlx-vlm": synthetic.mlx_vlm_name}
        tensors = synthetic.renamed(tensors, rename[layout])
    if layout == "mlx-vlm":
        tensors = {key: synthetic.mlx_layout(key, value) for key, value in tensors.items()}
    arrays = {key: mx.array(value) for key, value in tensors.items()}
    shape = {"layers": synthetic.TINY_LAYERS, "embed_dims": synthetic.TINY_DIMS}
    vision = FastViTConfig.from_json(Fields(PRESETS["mci3"].to_json() | shape, "tiny"))
    source = fastvlm_source(arrays, detect(arrays, "tiny"), vision, "mlp2x_gelu", "tiny")
    return fold_fastvit(source, vision, "vision.")


def fold_clip(variant: str) -> dict[str, mx.array]:
    layout = synthetic_clip.layouts_of(variant)[0]
    named = {entry.name: entry for entry in mobileclip.MOBILECLIP_LAYOUTS}
    shapes = synthetic_clip.tiny_shapes(variant, layout)
    arrays = {key: mx.array(value) for key, value in synthetic_clip.values(shapes).items()}
    config = synthetic_clip.tiny_config(variant)
    return mobileclip.canonical_tensors(arrays, config, named[layout], "tiny")


def assert_same(a: dict[str, mx.array], b: dict[str, mx.array]) -> None:
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]).item() for name in a)


def fail_if_called(name: str) -> Callable[..., Any]:
    def called(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{name} was called")

    return called


@pytest.mark.parametrize("variant", ["MobileCLIP-S0", "MobileCLIP-B", "MobileCLIP2-S4", None])
def test_folding_in_threads_keeps_the_default_device(
    variant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold_model = (
        (lambda: fold("llava_qwen2", True)) if variant is None else (lambda: fold_clip(variant))
    )

    def evaluated(_: int = 0) -> dict[str, mx.array]:
        tensors = fold_model()
        mx.eval(tensors)  # in the thread that built the graph
        return tensors

    expected = evaluated()
    for name in ("stream", "set_default_device", "set_default_stream"):
        monkeypatch.setattr(mx, name, fail_if_called(name))
    before = mx.default_device()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(evaluated, range(2)))
    assert mx.default_device() == before
    for result in results:
        assert_same(result, expected)


@pytest.mark.parametrize(
    ("layout", "unfused"),
    [("llava_qwen2", False), ("llava_qwen2", True), ("fast_vlm", True), ("mlx-vlm", False)],
)
def test_every_operation_runs_on_the_cpu(
    layout: str, unfused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation without a stream would run on the GPU, which lacks float64."""
    expected = fold(layout, unfused)

    def require_cpu(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            assert options.get("stream") == mx.cpu, name
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in OPERATORS:
            if hasattr(mx.array, name):
                patch.setattr(mx.array, name, fail_if_called(name))
        for name in METHODS:
            if hasattr(mx.array, name):
                patch.setattr(mx.array, name, require_cpu(name, getattr(mx.array, name)))
        for name in FUNCTIONS:
            patch.setattr(mx, name, require_cpu(name, getattr(mx, name)))
        found = fold(layout, unfused)
    assert_same(found, expected)


def test_loading_keeps_the_default_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlx_fastvlm.loader import read_canonical
    from mlx_mobileclip.checkpoints.hub import Checkpoint

    path = synthetic.write_layout(tmp_path, "llava_qwen2")
    for name in ("stream", "set_default_device", "set_default_stream"):
        monkeypatch.setattr(mx, name, fail_if_called(name))
    assert read_canonical(Checkpoint(path, "tiny"))[1]
