"""Zero-shot classification: the prompt ensemble against NumPy."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from standin import StandIn, StandInProcessor, paint

from mlx_mobileclip.errors import DataError, ImageError, ModelError, PromptError
from mlx_mobileclip.eval import zero_shot as zeroshot
from mlx_mobileclip.preprocess.tokenizer import clip_tokenizer

DATA = Path(__file__).parents[2] / "mlx_mobileclip/data"
TEMPLATES = ("a photo of a {}.", "a {} thing", "{} {}")
LABELS = ["red", "green", "blue", "a {} brace"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model() -> StandIn:
    return StandIn()


def reference(model: StandIn, labels: list[str], templates: tuple[str, ...]) -> np.ndarray:
    """Normalise each prompt, average, normalise; one label at a time, in float64."""
    rows = []
    for label in labels:
        prompts = [label.join(template.split("{}")) for template in templates]
        raw = model.encode_text(StandInProcessor().texts(prompts), normalize=False)
        units = np.array(raw, np.float64)
        units /= np.sqrt((units**2).sum(1, keepdims=True))
        mean = units.mean(0)
        rows.append(mean / np.sqrt((mean**2).sum()))
    return np.array(rows)


def test_data_equals_openai() -> None:
    classes = zeroshot.imagenet_classes()
    assert len(classes) == 1000
    assert (classes[0], classes[207], classes[999]) == ("tench", "Golden Retriever", "toilet paper")
    assert len(set(zeroshot.template_set("openai"))) == 80
    assert len(set(zeroshot.template_set("simple"))) == 7
    assert all(t.count("{}") == 1 for s in ("openai", "simple") for t in zeroshot.template_set(s))
    with pytest.raises(DataError, match="openai or simple"):
        zeroshot.template_set("../secret")


@pytest.mark.parametrize("per_batch", [1, 3, 4, 1000])
def test_ensemble_equals_the_formula(
    model: StandIn, per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeroshot, "PROMPTS_PER_BATCH", per_batch)
    steps: list[int] = []
    matrix = zeroshot.build_zero_shot_classifier(
        model, StandInProcessor(), LABELS, TEMPLATES, cache=False, on_progress=steps.append
    )
    np.testing.assert_allclose(np.array(matrix), reference(model, LABELS, TEMPLATES), atol=1e-6)
    assert sum(steps) == len(LABELS)


def test_classify_equals_the_formula(model: StandIn, tmp_path: Path) -> None:
    images = [paint(tmp_path / f"{c}.png", c) for c in ("blue", "red", "green")]
    results = zeroshot.classify(
        model, StandInProcessor(), images, LABELS, templates=TEMPLATES, top_k=3, batch_size=2
    )
    assert [best[0].label for best in results] == ["blue", "red", "green"]
    assert [len(best) for best in results] == [3, 3, 3]
    pixels = StandInProcessor().images(images)
    cosines = np.array(model.encode_image(pixels)) @ reference(model, LABELS, TEMPLATES).T
    probabilities = np.exp(50 * cosines) / np.exp(50 * cosines).sum(1, keepdims=True)
    for row, best in enumerate(results):
        for p in best:
            assert p.label == LABELS[p.index]
            assert p.similarity == pytest.approx(cosines[row, p.index], abs=1e-5)
            assert p.probability == pytest.approx(probabilities[row, p.index], rel=1e-3)
        assert [p.probability for p in best] == sorted((p.probability for p in best), reverse=True)


def test_numpy_classifier_is_accepted(model: StandIn, tmp_path: Path) -> None:
    image = paint(tmp_path / "a.png", "blue")
    texts: Any = np.array(zeroshot.build_zero_shot_classifier(model, StandInProcessor(), LABELS))
    (best,) = zeroshot.classify(model, StandInProcessor(), [image], LABELS, classifier=texts)
    assert best[0].label == "blue"


def test_tokenizer_accepts_lists_of_texts_only() -> None:
    tokenizer = clip_tokenizer()
    for texts in ({"a"}, {"a": 1}, (t for t in ["a"]), 3, None, np.array("a"), "a", b"a", []):
        with pytest.raises(PromptError, match="takes a list"):
            tokenizer(texts)
    for texts in ([1], np.array([1]), [b"a"], [None]):
        with pytest.raises(PromptError, match="a text cannot be"):
            tokenizer(texts)
    assert np.array_equal(tokenizer(np.array(["a", "b"])), tokenizer(("a", "b")))


def test_scale_is_clipped_and_ties_keep_the_order(model: StandIn, tmp_path: Path) -> None:
    model.logit_scale = mx.array(20.0)
    image = paint(tmp_path / "a.png", "red")
    (best,) = zeroshot.classify(model, StandInProcessor(), [image], ["red", "blue", "red"])
    assert [p.index for p in best] == [0, 2, 1]
    assert best[0].probability == best[1].probability == pytest.approx(0.5)


def test_wrong_arguments_are_refused(model: StandIn, tmp_path: Path) -> None:
    processor = StandInProcessor()
    image = paint(tmp_path / "a.png", "red")
    for labels, templates, match in (
        ([], TEMPLATES, "no labels"),
        ("cat", TEMPLATES, "no labels"),
        (["cat"], [], "no templates"),
        (["cat"], ["a photo"], "has no {}"),
        ({"cat"}, TEMPLATES, "no labels"),
        (["caf\udce9"], TEMPLATES, "not UTF-8 text"),
        ([1], TEMPLATES, "not UTF-8 text"),
        (["cat"], ["\udce9 {}"], "not UTF-8 text"),
    ):
        with pytest.raises(DataError, match=match):
            zeroshot.build_zero_shot_classifier(model, processor, labels, templates)
    with pytest.raises(DataError, match="at least 1"):
        zeroshot.classify(model, processor, [image], ["cat"], top_k=0)
    with pytest.raises(DataError, match="2 labels"):
        zeroshot.classify(model, processor, [image], ["a", "b"], classifier=mx.zeros((3, 4)))
    for images in ({image}, (i for i in [image]), 3, None):
        with pytest.raises(ImageError, match="takes a list"):
            zeroshot.classify(model, processor, images, ["cat"])
    with pytest.raises(ImageError, match="no such file"):
        zeroshot.classify(model, processor, [str(tmp_path / "none.png")], ["cat"])
    image_only = StandIn()
    image_only.text = None
    with pytest.raises(ModelError, match="image tower only"):
        zeroshot.build_zero_shot_classifier(image_only, processor, ["cat"])
    with pytest.raises(ModelError, match="image tower only"):
        zeroshot.classify(image_only, processor, [image], ["cat"], classifier=mx.zeros((1, 4)))
    model.text.weight = mx.full(model.text.weight.shape, float("nan"))
    with pytest.raises(ModelError, match="float32"):
        zeroshot.build_zero_shot_classifier(model, processor, ["cat"])


def test_data_files_name_their_source() -> None:
    for name in ("imagenet_classes.json", "imagenet_templates.json"):
        data = json.loads((DATA / name).read_text())
        assert "openai/CLIP" in data["source"]
        assert data["licence"].startswith("MIT")


@pytest.mark.parity
def test_classifier_equals_open_clip(model: StandIn) -> None:
    """open_clip's own classifier builder, run on the stand-in's embeddings."""
    from unittest.mock import patch

    import torch

    with patch("torch.library.register_fake", lambda *_, **__: lambda f: f):
        import torchvision  # noqa: F401
    from open_clip import (
        IMAGENET_CLASSNAMES,
        OPENAI_IMAGENET_TEMPLATES,
        SIMPLE_IMAGENET_TEMPLATES,
        build_zero_shot_classifier,
    )

    assert zeroshot.imagenet_classes() == tuple(IMAGENET_CLASSNAMES)
    pairs = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    for name, functions in pairs.items():
        assert zeroshot.template_set(name) == tuple(f("{}") for f in functions)

    class Torch:
        def encode_text(self, ids: torch.Tensor, normalize: bool) -> torch.Tensor:
            rows = model.encode_text(mx.array(ids.numpy()), normalize=normalize)
            return torch.from_numpy(np.array(rows))

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.array(StandInProcessor().texts(texts)))

    labels = list(IMAGENET_CLASSNAMES[:50])
    theirs = build_zero_shot_classifier(Torch(), tokenize, labels, OPENAI_IMAGENET_TEMPLATES)
    ours = zeroshot.build_zero_shot_classifier(
        model, StandInProcessor(), labels, zeroshot.template_set("openai"), cache=False
    )
    np.testing.assert_allclose(np.array(ours), theirs.numpy().T, atol=1e-6)
