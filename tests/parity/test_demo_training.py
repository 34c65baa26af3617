"""A few training steps of the demo models; the converted models equal the trained ones."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import train_fastvlm
import train_mobileclip
from captions import caption
from conversation import Conversations
from reference import torch
from tasks import TASKS, ask
from tolerances import relative_error
from world import HELD_OUT, render, scene

import mlx_fastvlm
import mlx_mobileclip
from mlx_mobileclip.preprocess.image import resize_pad

pytestmark = pytest.mark.parity
FLOAT16_WEIGHTS = 1e-2  # error of weights stored in float16
STEPS = ("TOWER", "PLACES", "DECODER", "TOGETHER", "REFINING")
FEW = {f"{name}_STEPS": 2 for name in STEPS}


def shrink(monkeypatch: pytest.MonkeyPatch, script: Any, **values: int) -> None:
    for name, value in values.items():
        monkeypatch.setattr(script, name, value)


def states(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.pt"))}


def test_trained_fastvlm_equals_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, train_fastvlm, **FEW, FEATURES=32)
    trained = train_fastvlm.run(tmp_path).eval()
    first = states(tmp_path)
    assert [path.stem for path in sorted(tmp_path.glob("*.jsonl"))] == [
        "decoder", "places", "refining", "together", "tower",
    ]  # fmt: skip
    train_fastvlm.run(tmp_path)  # there is nothing left to do
    assert states(tmp_path) == first
    model, processor = mlx_fastvlm.load(tmp_path / "demo", dtype="float32")
    shown = scene(HELD_OUT)
    pixels = np.asarray(resize_pad(render(shown), train_fastvlm.SIDE), np.float32) / 255
    conversations = Conversations(processor.tokenizer, 36, turns=1)
    for task in TASKS:
        question = ask(shown, random.Random(0), task)
        if question is None:
            continue
        encoded = conversations.encode(1, [question])
        prompt = [token for token, label, _ in encoded if label < 0]
        inputs = processor(question.text, render(shown))
        assert np.array(inputs.input_ids).tolist() == prompt
        with torch.no_grad():
            _, features = trained.tower(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            _, hidden = trained.hidden(features, torch.tensor([prompt]))
            expected = trained.decoder.lm_head(hidden).numpy()
        logits = model(inputs.input_ids[None], pixels=inputs.pixels)
        assert relative_error(logits, expected) < FLOAT16_WEIGHTS


def test_trained_mobileclip_equals_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = dict.fromkeys(("TOWER", "TEXT", "TOGETHER", "REFINING"), 2)
    few = {f"{name}_STEPS": count for name, count in steps.items()} | {"SCENES": 40}
    batches = dict.fromkeys(("TOWER_BATCH", "TEXT_BATCH", "TOGETHER_BATCH"), 8)
    shrink(monkeypatch, train_mobileclip, **few, **batches)
    trained = train_mobileclip.run(tmp_path).eval()
    first = states(tmp_path)
    assert first.keys() == {
        f"{name}.pt" for name in ("tower", "texts", "together", "reinforced", "refining")
    }
    model, processor = mlx_mobileclip.load(tmp_path / "demo", dtype="float32")
    scenes = [train_mobileclip.central(HELD_OUT + i) for i in range(4)]
    pixels = processor.images([render(shown) for shown in scenes])
    ids = processor.texts([caption(shown, random.Random(0)).text for shown in scenes])
    with torch.no_grad():
        images, *_ = trained.images(torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2))
        texts = trained.texts(torch.from_numpy(np.array(ids)).long())
    found = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    assert relative_error(found[0], images.numpy()) < FLOAT16_WEIGHTS
    assert relative_error(found[1], texts.numpy()) < FLOAT16_WEIGHTS
    for name in ("plain", "reinforced"):
        other, _ = mlx_mobileclip.load(tmp_path / name, dtype="float32")
        assert mx.isfinite(other.encode_text(ids)).all().item()
    train_mobileclip.run(tmp_path)
    assert states(tmp_path) == first
