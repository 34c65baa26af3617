"""Train the MobileCLIP demo model: the tower, then the texts, then both together.

    PYTHONPATH=. python tests/demo/train_mobileclip.py --out DIR

Run it again after an interruption: it goes on where it last saved.
"""

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import data
import numpy as np
from captions import LABELS, Caption, caption
from export import convert_mobileclip
from reference import F, MobileCLIP, Tower, torch
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from training import train
from world import Scene, scene

from mlx_mobileclip.image import Image, resize_shorter
from mlx_mobileclip.tokenizer import BASE, WORD_END, WORD_PATTERN, Tokenizer, clean

SIDE, EMBED_DIM, CONTEXT = 256, 128, 64
TOWER = {"layers": (1, 2, 4, 2), "embed_dims": (16, 32, 64, 128), "mlp_ratios": (3, 3, 3, 3)}
TEXT = {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 4}
SCENES = 24_000
TOWER_STEPS, TOWER_BATCH = 900, 32
TEXT_STEPS, TEXT_BATCH = 400, 192
TOGETHER_STEPS, TOGETHER_BATCH = 220, 96
SEEING = 0.1  # weight of the tower's own losses while it learns with the texts
MOST_SIMILAR = 100.0


def central(seed: int) -> Scene:
    """A scene that cropping leaves whole; every fourth has one shape."""
    return scene(seed, (1, 1) if seed % 4 == 0 else (1, 5), central=True)


def crop(image: Image.Image) -> Image.Image:
    """The preprocessing of MobileCLIP: shorter side to 256 px, then the central square."""
    resized = resize_shorter(image, SIDE, Image.Resampling.BILINEAR)
    left, top = (round((side - SIDE) / 2) for side in resized.size)
    return resized.crop((left, top, left + SIDE, top + SIDE))


def train_merges(directory: Path) -> Tokenizer:
    """Learn byte pairs from captions without printed texts, which are spelled by letters."""
    rng = random.Random(0)
    lines = [clean(caption(scene(seed, text=0), rng).text) for seed in range(4000)]
    lines += ["The text says"] * 400
    backend = Backend(models.BPE(end_of_word_suffix=WORD_END))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, end_of_word_suffix=WORD_END, min_frequency=20, show_progress=False
    )
    backend.train_from_iterator([clean(line) for line in lines], trainer)
    backend.model.save(str(directory))
    merges = [
        line for line in (directory / "merges.txt").read_text().splitlines() if line[0] != "#"
    ]
    (directory / "vocab.json").unlink()
    (directory / "merges.txt").write_text("\n".join(merges) + "\n")
    return Tokenizer([tuple(line.split(" ")) for line in merges], CONTEXT)


def contrastive(
    images: Tensor, texts: Tensor, scale: Tensor, captions: list[Caption], scenes: list[Scene]
) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy both ways; a caption that is true of another image as well is no negative."""
    logits = scale.exp().clamp(max=MOST_SIMILAR) * images @ texts.T
    also = torch.tensor([[c.is_true_of(s) for c in captions] for s in scenes])
    also.fill_diagonal_(False)
    logits = logits.masked_fill(also, -1e4)
    own = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    right = (logits.argmax(1) == own).float().mean().item()
    return loss, {"loss": loss.item(), "image to text": right, "scale": scale.exp().item()}


class Training:
    """The phases of one model."""

    def __init__(self, scenes: data.Scenes, words: Tokenizer, out: Path):
        self.scenes, self.words, self.out = scenes, words, out
        tower = Tower("fastvit_mci0", crop=True, **TOWER)
        size = words.end_id + 1
        self.model = MobileCLIP(tower, {**TEXT, "vocab_size": size}, EMBED_DIM)
        self.present = nn.Linear(tower.trunk.num_features, len(LABELS))

    def see(self) -> None:
        """Phase one: the tower learns to name what is where, and its mean what there is."""
        model = nn.ModuleList([self.model.tower, self.present]).train()

        def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
            pixels, shown = batch
            middle, final = self.model.tower(pixels)
            losses = self.model.tower.loss(middle, final, shown)
            there = torch.zeros(len(shown), len(LABELS))
            for row, one in zip(there, shown, strict=True):
                row[[LABELS.index(shape.name) for shape in one.shapes]] = 1
            logits = self.present(final.mean((2, 3)))
            losses["present"] = 10 * F.binary_cross_entropy_with_logits(logits, there)
            return sum(losses.values()), {k: v.item() for k, v in losses.items()}

        self._train("tower", model, 3e-3, step, TOWER_STEPS, TOWER_BATCH)

    def match(self) -> None:
        """Phase two: the text tower and the projection learn to match what the tower sees."""
        self.model.eval()
        seen = data.looked_at(
            self.out / "means.npy",
            self.scenes,
            len(self.scenes.scenes),
            lambda pixels: self.model.tower(pixels)[1].mean((2, 3)),
        )
        self.model.text.train()
        parts = {"text": self.model.text, "projection": self.model.projection}
        holder = nn.Module()
        holder.parts, holder.scale = nn.ModuleDict(parts), self.model.logit_scale

        def step(batch: tuple[np.ndarray, list[Scene]]) -> tuple[Tensor, dict[str, float]]:
            chosen, shown = batch
            images = F.normalize(
                self.model.projection(torch.from_numpy(seen[chosen]).float()), dim=-1
            )
            captions = self._captions("texts", shown)
            texts = self.model.texts(self._ids(captions))
            return contrastive(images, texts, self.model.logit_scale, captions, shown)

        train(
            "texts",
            holder,
            [{"params": list(holder.parameters()), "lr": 1e-3}],
            lambda done: self.scenes.choices(TEXT_BATCH, done),
            step,
            TEXT_STEPS,
            self.out,
        )

    def together(self, name: str, steps: int) -> None:
        """Phase three: both towers."""
        self.model.train()
        self.model.tower.eval()  # BatchNorm keeps its statistics, as when it is folded

        def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
            pixels, shown = batch
            images, middle, final = self.model.images(pixels)
            captions = self._captions(name, shown)
            ids = self._ids(captions)
            texts, scale = self.model.texts(ids), self.model.logit_scale
            loss, figures = contrastive(images, texts, scale, captions, shown)
            seen = self.model.tower.loss(middle, final, shown)
            return loss + SEEING * sum(seen.values()), figures

        self._train(name, self.model, 5e-4, step, steps, TOGETHER_BATCH)

    def _train(
        self, name: str, model: nn.Module, lr: float, step: Any, steps: int, batch: int
    ) -> None:
        groups = [{"params": list(model.parameters()), "lr": lr}]
        source = partial(self.scenes.batches, batch)
        train(name, model, groups, source, step, steps, self.out)

    def _captions(self, name: str, shown: list[Scene]) -> list[Caption]:
        rng = random.Random(f"{name} {sum(one.seed for one in shown)}")
        return [caption(one, rng) for one in shown]

    def _ids(self, captions: list[Caption]) -> Tensor:
        return torch.from_numpy(self.words([one.text for one in captions])).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(chr(10))[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for states and logs")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    words = train_merges(out)
    assert words.start_id >= BASE - 2
    scenes = data.Scenes(out / "scenes.bin", SCENES, central, crop, SIDE)
    training = Training(scenes, words, out)
    training.see()
    training.match()
    training.together("together", TOGETHER_STEPS)
    text = {**TEXT, "vocab_size": words.end_id + 1}
    convert_mobileclip(training.model, TOWER, text, SIDE, out / "demo")


if __name__ == "__main__":
    main()
