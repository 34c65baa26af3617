"""The reinforced loss against NumPy and PyTorch."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mobileclip.errors import DataError
from mlx_mobileclip.train.reinforced_loss import Captions, Teachers, reinforced_loss

B, E = 6, 5
TEACHERS = Teachers(widths=(4, 3), scales=(70.0, 60.0))
LOG_SCALE = float(np.log(20.0))


def unit(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    values = rng.normal(size=(rows, width)) + 0.8
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def stored() -> np.ndarray:
        return np.concatenate([unit(rng, B, width) for width in TEACHERS.widths], axis=1)

    return {
        "images": unit(rng, B, E),
        "true": unit(rng, B, E),
        "synthetic": unit(rng, B, E),
        "teacher_images": stored(),
        "teacher_true": stored(),
        "teacher_synthetic": stored(),
    }


def by_hand(data: dict[str, np.ndarray], kinds: tuple[str, ...], w0: float, w1: float) -> float:
    """The formulas term by term in float64, without matrix products."""

    def softmax(scores: list[float]) -> list[float]:
        weights = [np.exp(s - max(scores)) for s in scores]
        return [w / sum(weights) for w in weights]

    def dot(a: np.ndarray, b: np.ndarray) -> float:
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    total = 0.0
    for kind in kinds:
        sides = (data["images"], data["teacher_images"]), (data[kind], data[f"teacher_{kind}"])
        for (mine, theirs), (other, others) in (sides, sides[::-1]):
            for i in range(B):
                student = softmax([20.0 * dot(mine[i], other[j]) for j in range(B)])
                first = softmax([70.0 * dot(theirs[i][:4], others[j][:4]) for j in range(B)])
                second = softmax([60.0 * dot(theirs[i][4:], others[j][4:]) for j in range(B)])
                contrastive = -np.log(student[i])
                distilled = -sum(
                    (p + q) / 2 * np.log(s) for p, q, s in zip(first, second, student, strict=True)
                )
                total += (w0 * contrastive + w1 * distilled) / 2 / B
    return float(total)


def ours(
    data: dict[str, Any], kinds: tuple[str, ...], weights: tuple[float, float], scale: Any = None
) -> mx.array:
    arrays = {name: mx.array(value) for name, value in data.items()}
    captions = [Captions(arrays[kind], arrays[f"teacher_{kind}"]) for kind in kinds]
    return reinforced_loss(
        arrays["images"],
        captions,
        arrays["teacher_images"],
        mx.array(LOG_SCALE) if scale is None else scale,
        teachers=TEACHERS,
        weights=weights,
    )


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.25, 0.75)])
@pytest.mark.parametrize("kinds", [("true",), ("synthetic",), ("true", "synthetic")])
def test_loss_equals_the_formula(kinds: tuple[str, ...], weights: tuple[float, float]) -> None:
    data = batch()
    loss = ours(data, kinds, weights)
    assert loss.shape == ()
    assert loss.dtype == mx.float32
    assert loss.item() == pytest.approx(by_hand(data, kinds, *weights), rel=1e-5)


def test_gradient_equals_finite_differences() -> None:
    data = batch(3)
    kinds, weights = ("true", "synthetic"), (0.25, 0.75)
    for name in ("images", "true", "synthetic"):

        def loss(value: mx.array, name: str = name) -> mx.array:
            return ours({**data, name: value}, kinds, weights)

        gradient = np.array(mx.grad(loss)(mx.array(data[name])))
        for i, j in ((0, 0), (2, 3), (5, 4)):
            step = np.zeros((B, E))
            step[i, j] = 1e-5
            up = {**data, name: data[name].astype(np.float64) + step}
            down = {**data, name: data[name].astype(np.float64) - step}
            slope = (by_hand(up, kinds, *weights) - by_hand(down, kinds, *weights)) / 2e-5
            assert gradient[i, j] == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_teachers_get_no_gradient() -> None:
    data = batch()

    def loss(value: mx.array) -> mx.array:
        return ours({**data, "teacher_images": value}, ("true",), (0.0, 1.0))

    gradient = mx.grad(loss)(mx.array(data["teacher_images"]))
    assert not mx.any(gradient != 0).item()


def test_half_precision_embeddings_are_summed_in_float32() -> None:
    data = batch()
    half = {name: mx.array(value).astype(mx.float16) for name, value in data.items()}
    full = {name: np.array(value).astype(np.float32) for name, value in half.items()}
    assert ours(half, ("true",), (0.5, 0.5)).item() == pytest.approx(
        by_hand(full, ("true",), 0.5, 0.5), rel=1e-4
    )


def test_shapes_are_checked() -> None:
    data = batch()
    for name, match in (
        ("true", "texts has shape"),
        ("teacher_true", "teacher_texts has shape"),
        ("teacher_images", "teacher_images has shape"),
    ):
        with pytest.raises(DataError, match=match):
            ours({**data, name: data[name][:, :-1]}, ("true",), (0.0, 1.0))
    with pytest.raises(DataError, match="no captions"):
        ours(data, (), (0.0, 1.0))
    with pytest.raises(DataError, match="each teacher its own"):
        # The published training scripts do this, and fail with an IndexError.
        reinforced_loss(
            mx.zeros((2, 3)),
            [Captions(mx.zeros((2, 3)), mx.zeros((2, 8)))],
            mx.zeros((2, 8)),
            mx.array(0.0),
            teachers=Teachers(widths=(4, 4), scales=(100.0,)),
        )


@pytest.mark.parity
def test_loss_and_gradient_equal_torch() -> None:
    import torch
    from torch.nn import functional

    data = batch(7)
    kinds, weights = ("true", "synthetic"), (0.25, 0.75)
    leaves = {k: torch.tensor(v, dtype=torch.float64) for k, v in data.items()}
    scale = torch.tensor(LOG_SCALE, dtype=torch.float64, requires_grad=True)
    for name in ("images", *kinds):
        leaves[name].requires_grad_(True)

    def distribution(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (
            (70 * a[:, :4] @ b[:, :4].T).softmax(1) + (60 * a[:, 4:] @ b[:, 4:].T).softmax(1)
        ) / 2

    total = torch.zeros((), dtype=torch.float64)
    for kind in kinds:
        a, b = leaves["teacher_images"], leaves[f"teacher_{kind}"]
        logits = scale.exp() * leaves["images"] @ leaves[kind].T
        for scores, target in ((logits, distribution(a, b)), (logits.T, distribution(b, a))):
            total = total + weights[0] / 2 * functional.cross_entropy(scores, torch.arange(B))
            total = total + weights[1] / 2 * functional.cross_entropy(scores, target)
    total.backward()

    def loss(parts: dict[str, mx.array]) -> mx.array:
        return ours(
            {**data, **{n: parts[n] for n in parts if n != "scale"}}, kinds, weights, parts["scale"]
        )

    parts = {name: mx.array(data[name]) for name in ("images", *kinds)}
    value, gradients = mx.value_and_grad(loss)(parts | {"scale": mx.array(LOG_SCALE)})
    assert value.item() == pytest.approx(total.item(), rel=1e-6)
    for name, gradient in gradients.items():
        expected = (scale if name == "scale" else leaves[name]).grad
        assert expected is not None
        worst = np.abs(np.array(gradient) - expected.numpy()).max() / expected.abs().max().item()
        assert worst < 1e-5, (name, worst)
