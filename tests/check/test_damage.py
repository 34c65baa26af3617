"""`check` fails on damaged weights, operations and caches, and names them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from mlx_fastvlm.check.command import main
from mlx_fastvlm.models.kv_cache import KVCache
from mlx_mobileclip import layers
from mlx_mobileclip.__main__ import main as clip_main
from mlx_mobileclip.check import forms, report
from mlx_mobileclip.check.compare import Models
from mlx_mobileclip.cpu import attention, elementwise, stem
from mlx_mobileclip.gpu import elementwise as gpu_elementwise

DEMO = ["--model", "demo", "--quiet", "--dtype", "float32"]
LAYER = "language_model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def no_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FORMS", ())


@pytest.fixture
def failed_check(
    no_forms: None, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[set[str], dict[str, Any]]]:
    """Run a check that must fail; returns the names of failures and the JSON report."""

    def check(run: Callable[[list[str]], int] = main, *command: str) -> Any:
        assert run([*command, *DEMO, "--json"]) == 1
        out, err = capsys.readouterr()
        assert err == "error: this machine computes wrong values; report what --json prints\n"
        result = json.loads(out, parse_constant=pytest.fail)
        assert not result["right"] and result["verdict"].startswith("WRONG: ")
        rows = [row for row in result["comparisons"] if not row["right"]]
        assert rows[0]["stage"] in result["verdict"]
        return {f"{row['stage']}/{row['part']}".rstrip("/") for row in rows}, result

    return check


def damage_weights(monkeypatch: pytest.MonkeyPatch, change: Callable[[mx.array], mx.array]) -> None:
    """Change LAYER on the device only."""
    weights = Models.weights

    @contextmanager
    def damaged(self: Models, *prefixes: str) -> Iterator[None]:
        with weights(self, *prefixes):
            if LAYER in self.loaded:
                self.device.load_weights([(LAYER, change(self.loaded[LAYER]))], strict=False)
            yield

    monkeypatch.setattr(Models, "weights", damaged)


def test_weight_of_one_layer(monkeypatch: pytest.MonkeyPatch, failed_check: Any) -> None:
    damage_weights(monkeypatch, lambda weight: weight * 1.001)
    names, result = failed_check()
    assert names == {"decoder layer 2/prompt", "decoder layer 2/next token"}
    [later] = (
        row
        for row in result["comparisons"]
        if row["stage"] == "decoder layer 3" and row["part"] == "prompt"
    )
    assert later["chain_error"] > 10 * later["error"]


def test_not_a_number(monkeypatch: pytest.MonkeyPatch, failed_check: Any) -> None:
    damage_weights(monkeypatch, lambda weight: weight * float("nan"))
    names, result = failed_check()
    assert names == {
        "decoder layer 2/prompt",
        "decoder layer 2/next token",
        "tokens/0 of 10 the same",
    }
    assert result["comparisons"][-1]["error"] is None


def test_activation(monkeypatch: pytest.MonkeyPatch, failed_check: Any) -> None:
    monkeypatch.setattr(
        elementwise,
        "gelu",
        lambda x: x * mx.sigmoid(1.702 * x),  # close, but another function
    )
    names, _ = failed_check()
    assert {"stem", "stage 2/block 1", "stage 4/downsampling", "projector"} <= names
    assert not any(name.startswith("decoder") for name in names)


def test_attention_mask(monkeypatch: pytest.MonkeyPatch, failed_check: Any) -> None:
    original = attention.attention
    monkeypatch.setattr(
        attention, "attention", lambda q, k, v, s, causal: original(q, k, v, s, False)
    )
    names, _ = failed_check()
    assert names >= {f"decoder layer {i}/prompt" for i in range(4)}
    assert "decoder layer 0/next token" not in names  # it may see all positions


def test_decoding_step(monkeypatch: pytest.MonkeyPatch, failed_check: Any) -> None:
    original = KVCache.update_and_fetch

    def damaged(self: KVCache, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        both = original(self, keys, values)
        return both if keys.shape[2] > 1 else (both[0][:, :, 1:], both[1][:, :, 1:])

    monkeypatch.setattr(KVCache, "update_and_fetch", damaged)
    names, _ = failed_check()
    assert {name.partition("/")[2] for name in names} == {"next token"} and len(names) == 4


def test_missing_kernel(monkeypatch: pytest.MonkeyPatch, failed_check: Any) -> None:
    def missing(*_: Any) -> mx.array:
        raise RuntimeError("Unable to load kernel\nsteel_conv")

    monkeypatch.setattr(stem, "conv3x3_stride2", missing)
    names, result = failed_check()
    assert names == {"stem", "tokens"}
    assert result["comparisons"][0]["failure"] == "Unable to load kernel steel_conv"


def test_text_tower(monkeypatch: pytest.MonkeyPatch, failed_check: Any) -> None:
    original = attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, k, v, s, c: original(q, k, v, 0.9 * s, c))
    names, _ = failed_check(clip_main, "check")
    assert {"stage 3/block 0", "text layer 0", "text layer 2"} <= names


def test_table_and_verdict(
    monkeypatch: pytest.MonkeyPatch, no_forms: None, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_weights(monkeypatch, lambda weight: weight * 1.001)
    assert main(DEMO) == 1
    lines = capsys.readouterr().out.splitlines()
    marked = [line for line in lines if line.endswith("WRONG")]
    assert [line.split("  ")[0] for line in marked] == [
        "decoder layer 2 (prompt)",
        "decoder layer 2 (next token)",
    ]
    assert lines[-1] == "WRONG: decoder layer 2 (prompt), decoder layer 2 (next token)"


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        (gpu_elementwise, "bias_gelu", "GELU with bias"),
        (gpu_elementwise, "swiglu", "SwiGLU"),
        (layers, "_add_biases", "two biases"),
        (layers, "_quantized_product", "nvfp4 product of 1"),
    ],
)
def test_wrong_operation(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str, name: str
) -> None:
    [form] = (form for form in forms.FORMS if form.name == name)
    [row] = forms.compare_form(form, mx.float16, 7e-3)
    assert row.right
    original: Any = getattr(module, function)

    def damaged(*args: Any) -> Any:
        y = original(*args)
        return [each * 1.01 for each in y] if isinstance(y, tuple) else y * 1.01

    monkeypatch.setattr(module, function, damaged)
    [row] = forms.compare_form(form, mx.float16, 7e-3)
    assert not row.right
