"""Train the MobileCLIP demo model: the image tower, then the text tower, then both, twice.

After phase three, a second text tower is trained from the same start by distillation from that
model, with the loss of reinforced training, to compare the losses: DIR/plain and DIR/reinforced.

    PYTHONPATH=. python tests/demo/train_mobileclip.py --out DIR

Run it again after an interruption: it resumes from the last saved state.
"""

import argparse
import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import data
import numpy as np
from captions import LABELS, Caption, caption
from export import convert_mobileclip
from reference import TOWER, F, MobileCLIP, Tower, torch
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from training import train
from variations import COUNT, variations
from world import SIZES, Scene, scene

from mlx_mobileclip.models.clip import PreprocessConfig
from mlx_mobileclip.preprocess.processor import resized
from mlx_mobileclip.preprocess.tokenizer import (
    WORD_END,
    WORD_PATTERN,
    Tokenizer,
    clean,
    write_merges,
)

SIDE, EMBED_DIM, CONTEXT = 256, 128, 64
TEXT = {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 3}
SCENES = 24_000  # with cached features, for training the text tower
PREPARE = partial(resized, config=PreprocessConfig(SIDE, "bilinear", (0.0,) * 3, (1.0,) * 3))
GROUP = 8  # consecutive scenes in a batch, among them hard negatives
FACTS = len(LABELS) * (1 + len(SIZES) + 1 + 9)
TOWER_STEPS, TOWER_BATCH = 1800, 32
TEXT_STEPS, TEXT_BATCH = 600, 192
TOGETHER_STEPS, REFINING_STEPS, TOGETHER_BATCH = 120, 400, 96
FACTS_WEIGHT = 60.0  # of predicting the facts from the pooled features
TOWER_WEIGHT = 0.1  # of the losses of the tower's heads in phases three and four
MAX_LOGIT_SCALE = 100.0


def central(seed: int) -> Scene:
    """A scene that is complete after cropping.

    Of GROUP consecutive scenes, the first four are variations of one another, and one of the others
    has a single shape.
    """
    group, number = divmod(seed, GROUP)
    if number < COUNT:
        return variations(group)[number]
    return scene(seed, (1, 1) if number == COUNT else (1, 5), central=True)


def varied_less(seed: int) -> Scene:
    """Like `central`, but of GROUP scenes two are variations and two have a single shape."""
    group, number = divmod(seed, GROUP)
    if number < 2:
        return variations(group)[number * (1 + group % (COUNT - 1))]
    return scene(seed, (1, 1) if number < 4 else (1, 5), central=True)


def facts(shown: Scene) -> list[int]:
    """Labels below FACTS: which shapes are present, of which size, where, and which twice."""
    found = set()
    for shape in shown.shapes:
        label, of_size = LABELS.index(shape.name), list(SIZES).index(shape.size)
        found |= {label, len(LABELS) * (1 + of_size) + label}
        if shown.width == shown.height:
            row, column = (min(2, int(3 * v)) for v in (shape.y, shape.x))
            found.add(len(LABELS) * (5 + 3 * row + column) + label)
        if sum(other.name == shape.name for other in shown.shapes) == 2:
            found.add(len(LABELS) * 4 + label)
    return sorted(found)


def train_merges(directory: Path) -> Tokenizer:
    """Train BPE merges on captions without printed texts, which are spelled by letters."""
    rng = random.Random(0)
    lines = [caption(scene(seed, text=0), rng).text for seed in range(4000)]
    lines += [caption(each, rng).text for seed in range(1000) for each in variations(seed)]
    lines += ["The text says"] * 400
    backend = Backend(models.BPE(end_of_word_suffix=WORD_END))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=440, end_of_word_suffix=WORD_END, min_frequency=20, show_progress=False
    )
    backend.train_from_iterator(map(clean, lines), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    write_merges(directory, merges)
    return Tokenizer(merges, CONTEXT)


def contrastive(
    images: Tensor, texts: Tensor, scale: Tensor, captions: list[Caption], scenes: list[Scene]
) -> tuple[Tensor, dict[str, float]]:
    """Symmetric contrastive loss; captions that are also true of other images are not negatives."""
    logits = scale.exp().clamp(max=MAX_LOGIT_SCALE) * images @ texts.T
    also = torch.tensor([[c.is_true_of(s) for c in captions] for s in scenes])
    also.fill_diagonal_(False)
    logits = logits.masked_fill(also, -1e4)
    own = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    right = (logits.argmax(1) == own).float().mean().item()
    return loss, {"loss": loss.item(), "image to text": right, "scale": scale.exp().item()}


def reinforced(
    images: Tensor, texts: Tensor, scale: Tensor, similar: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Symmetric distillation from a teacher's softmax: weights (0, 1) of MobileCLIP's paper."""
    logits = scale.exp().clamp(max=MAX_LOGIT_SCALE) * images @ texts.T
    by_image = F.cross_entropy(logits, similar.softmax(1))
    by_text = F.cross_entropy(logits.T, similar.T.softmax(1))
    loss = (by_image + by_text) / 2
    right = (logits.argmax(1) == torch.arange(len(logits))).float().mean().item()
    return loss, {"loss": loss.item(), "image to text": right, "scale": scale.exp().item()}


class Training:
    """The phases of one model."""

    def __init__(self, tokenizer: Tokenizer, out: Path):
        self.tokenizer, self.out = tokenizer, out
        self.text = {**TEXT, "vocab_size": tokenizer.end_id + 1}
        self.tower = Tower(crop=True)

    def train_tower(self) -> None:
        """Phase one: train the tower's heads, and to predict the facts from pooled features."""
        present = nn.Linear(self.tower.trunk.num_features, FACTS)
        model = nn.ModuleList([self.tower, present]).train()

        def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
            pixels, shown = batch
            middle, final = self.tower(pixels)
            losses = self.tower.loss(middle, final, shown)
            targets = torch.zeros(len(shown), FACTS)
            for row, one in zip(targets, shown, strict=True):
                row[facts(one)] = 1
            logits = present(final.mean((2, 3)))
            losses["present"] = FACTS_WEIGHT * F.binary_cross_entropy_with_logits(logits, targets)
            return sum(losses.values()), {k: v.item() for k, v in losses.items()}

        batches = partial(self._batches, central, TOWER_BATCH, 0)
        self._train("tower", model, 3e-3, batches, step, TOWER_STEPS)
        self.tower.eval()  # BatchNorm keeps its statistics from now on, as when it is folded

    def train_texts(self, name: str, teacher: MobileCLIP | None = None) -> MobileCLIP:
        """Phase two: train text tower and projection with a frozen image tower.

        With a teacher, only by distillation from it, with the reinforced loss.
        """
        torch.manual_seed(1)
        model = MobileCLIP(self.tower, self.text, EMBED_DIM).train()
        self.tower.eval()
        pooled = self._cached("means", lambda pixels: self.tower(pixels)[1].mean((2, 3)))
        if teacher is not None:
            teacher.eval()
            teacher_images = self._cached("known", lambda pixels: teacher.images(pixels)[0])
        learning = nn.ModuleList([model.text, model.projection])
        learning.logit_scale = model.logit_scale

        def step(chosen: np.ndarray) -> tuple[Tensor, dict[str, float]]:
            shown = [central(int(seed)) for seed in chosen]
            features = torch.from_numpy(pooled[chosen]).float()
            images = F.normalize(model.projection(features), dim=-1)
            captions = self._captions("texts", shown)
            ids = self._ids(captions)
            texts = model.texts(ids)
            if teacher is None:
                return contrastive(images, texts, model.logit_scale, captions, shown)
            with torch.no_grad():
                similar = torch.from_numpy(teacher_images[chosen]).float() @ teacher.texts(ids).T
                similar *= teacher.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            return reinforced(images, texts, model.logit_scale, similar)

        groups = [{"params": list(learning.parameters()), "lr": 1e-3}]

        def source(done: int) -> Iterator[np.ndarray]:
            for groups in data.choose(TEXT_BATCH // GROUP, done, SCENES // GROUP):
                yield (GROUP * groups[:, None] + np.arange(GROUP)).ravel()

        train(name, learning, groups, source, step, TEXT_STEPS, self.out)
        return model

    def train_together(self, model: MobileCLIP) -> None:
        """Phase three: train both towers."""
        first = TOWER_STEPS * TOWER_BATCH // TOGETHER_BATCH
        self._match_both("together", model, central, first, TOGETHER_STEPS)

    def train_refining(self, model: MobileCLIP) -> None:
        """Phase four: train both towers on scenes with fewer variations."""
        first = TOWER_STEPS * TOWER_BATCH // TOGETHER_BATCH + TOGETHER_STEPS
        self._match_both("refining", model, varied_less, first, REFINING_STEPS)

    def _match_both(
        self, name: str, model: MobileCLIP, make: data.MakeScene, first: int, steps: int
    ) -> None:
        model.train()
        model.tower.eval()

        def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
            pixels, shown = batch
            images, middle, final = model.images(pixels)
            captions = self._captions("together", shown)
            texts = model.texts(self._ids(captions))
            loss, figures = contrastive(images, texts, model.logit_scale, captions, shown)
            head_losses = model.tower.loss(middle, final, shown)
            return loss + TOWER_WEIGHT * sum(head_losses.values()), figures

        batches = partial(self._batches, make, TOGETHER_BATCH, first)
        self._train(name, model, 5e-4, batches, step, steps)

    def convert(self, model: MobileCLIP, name: str) -> None:
        convert_mobileclip(model, TOWER, self.text, SIDE, self.out / name)

    def _batches(
        self, make: data.MakeScene, size: int, first: int, done: int
    ) -> Iterator[tuple[Tensor, list[Scene]]]:
        """Batches of new scenes, beginning with batch `first` + `done`."""
        return data.draw_batches(make, PREPARE, size, first + done)

    def _train(
        self, name: str, model: nn.Module, lr: float, batches: Any, step: Any, steps: int
    ) -> None:
        groups = [{"params": list(model.parameters()), "lr": lr}]
        train(name, model, groups, batches, step, steps, self.out)

    def _cached(self, name: str, encode: Callable[[Tensor], Tensor]) -> np.ndarray:
        return data.cached_features(self.out / f"{name}.npy", SCENES, central, PREPARE, encode)

    def _captions(self, name: str, shown: list[Scene]) -> list[Caption]:
        rng = random.Random(f"{name} {sum(one.seed for one in shown)}")
        return [caption(one, rng) for one in shown]

    def _ids(self, captions: list[Caption]) -> Tensor:
        return torch.from_numpy(self.tokenizer([one.text for one in captions])).long()


def run(out: Path) -> MobileCLIP:
    """Run all phases and write the checkpoints `out`/demo, plain and reinforced."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = train_merges(out)
    training = Training(tokenizer, out)
    training.train_tower()
    model = training.train_texts("texts")
    training.convert(model, "plain")
    tower = copy.deepcopy(training.tower)
    training.train_together(model)
    training.tower = tower
    student = training.train_texts("reinforced", teacher=model)
    training.convert(student, "reinforced")
    training.train_refining(model)
    training.convert(model, "demo")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(chr(10))[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for states and logs")
    run(parser.parse_args().out)


if __name__ == "__main__":
    main()
