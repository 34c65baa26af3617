"""Train the FastVLM demo model: the tower, then projector and decoder.

    PYTHONPATH=. python tests/demo/train_fastvlm.py --out DIR

Run it again after an interruption: it resumes from the last saved state.
"""

import argparse
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import data
import numpy as np
from conversation import Batch, Conversations, train_tokenizer
from export import convert_fastvlm, write_apple_fastvlm
from reference import TOWER, F, FastVLM, Tower, torch
from torch import Tensor, nn
from training import train
from world import Scene, scene

from mlx_fastvlm.models.fastvlm import IMAGE_TOKEN
from mlx_fastvlm.preprocess.tokenizer import Tokenizer
from mlx_mobileclip.preprocess.image import resize_pad

SIDE = 384
FEATURES = 40_000  # scenes with cached features, for phase three
LATER = 200_000  # first scene of phases four and five
PREPARE = partial(resize_pad, size=SIDE)
TEXT = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TOWER_STEPS, PLACES_STEPS, TOWER_BATCH = 2200, 600, 32
DECODER_STEPS, TOGETHER_STEPS, REFINING_STEPS, ANSWER_BATCH = 7000, 500, 2200, 16
TURNS = 7  # maximum number of questions per conversation
# Relative frequencies of tasks; 1 for all others.
SHARES = {"count": 1.8, "position": 1.5, "size": 1.2, "read": 1.2, "relation": 1.2, "describe": 0.7}
# The same for phase five, with more conversations about two images.
REFINING_SHARES = SHARES | {"describe": 2.0, "relation": 1.6, "structured": 1.2}
REFINING_IMAGES = {1: 0.4, 2: 0.54, 3: 0.06}
REFINING_COMPARING = 0.6  # share of comparisons in conversations about two images
TOWER_WEIGHT = 0.2  # of the losses of the tower's heads in phase four
IMAGE_TOKEN_WEIGHT = 50.0  # of the loss by which image tokens predict words for their shapes
QUESTION_WEIGHT = 3.0  # of the loss by which a question's tokens predict words of its answer

Loss = tuple[Tensor, dict[str, float]]


def train_tower(tower: Tower, out: Path) -> None:
    """Phases one and two: train the tower's heads, in phase two also on places in the scene.

    Phase one needs only the surroundings of a cell, so places come later. In phase two, empty cells
    have full weight, so that a shape between two cells is detected once.
    """
    tower.train()

    def step(batch: Any, left_out: tuple[str, ...] = ()) -> Loss:
        pixels, shown = batch
        losses = tower.loss(*tower(pixels), shown)
        used = [value for name, value in losses.items() if name not in left_out]
        return sum(used), {name: value.item() for name, value in losses.items()}

    def batches(phase_start: int, done: int) -> Iterator[Any]:
        return data.draw_batches(scene, PREPARE, TOWER_BATCH, phase_start + done)

    groups: list[dict[str, Any]] = [{"params": list(tower.parameters()), "lr": 3e-3}]
    train(
        "tower", tower, groups, partial(batches, 0), partial(step, left_out=("where",)),
        TOWER_STEPS, out,
    )  # fmt: skip
    groups[0]["lr"] = 1e-3
    tower.empty_weight = 1.0
    train("places", tower, groups, partial(batches, TOWER_STEPS), step, PLACES_STEPS, out)


def word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Binary cross entropy over the vocabulary, of which few words apply."""
    return F.binary_cross_entropy_with_logits(logits, words, pos_weight=torch.tensor(10.0))


def before_answers(labels: Tensor) -> Tensor:
    """Mask of the last five tokens before each answer, which end its question."""
    answered = F.pad((labels >= 0).float(), (0, 5))[:, None]
    return F.max_pool1d(answered, 6, stride=1)[:, 0] > 0


class AnswerLoss:
    """The loss of phases three to five: cross entropy of the answers, and auxiliary losses."""

    def __init__(self, model: FastVLM, tokenizer: Tokenizer):
        """Create the loss for a model and its tokenizer."""
        self.model = model
        self.conversations = Conversations(tokenizer, (SIDE // 64) ** 2, TURNS)
        self.conversations.shares |= SHARES
        self.ordinals: nn.Linear | None = None  # predicts the image of a token, in phase five

    def loss(self, phase: str, features: Tensor, shown: list[Scene]) -> Loss:
        """Loss of a batch of scenes, given their features, and figures to log."""
        rng = random.Random(f"{phase} {sum(scene.seed for scene in shown)}")
        right: dict[str, list[float]] = defaultdict(list)
        answers, count = torch.zeros(()), 0
        losses: dict[str, Tensor] = self._images(features, shown)
        batches = self.conversations.batches(shown, rng)
        for said in batches:
            summed, tokens, auxiliary = self._conversations(features[said.images], said, right)
            answers, count = answers + summed, count + tokens
            for name, value in auxiliary.items():
                losses[name] = losses.get(name, torch.zeros(())) + value / len(batches)
        answers = answers / count
        figures = {"loss": answers.item()}
        figures |= {task: sum(found) / len(found) for task, found in sorted(right.items())}
        figures |= {name: value.item() for name, value in losses.items()}
        return answers + sum(losses.values()), figures

    def _images(self, features: Tensor, shown: list[Scene]) -> dict[str, Tensor]:
        """Losses by which image tokens predict the words and places of their shapes."""
        model, conversations = self.model, self.conversations
        images = model.project(features)
        known, where = conversations.place_targets(shown)
        return {
            "naming": IMAGE_TOKEN_WEIGHT
            * word_loss(model.vocabulary_logits(images), conversations.word_targets(shown)),
            "pairs": IMAGE_TOKEN_WEIGHT
            * word_loss(model.pairs(images), conversations.pair_targets(shown)),
            "places": F.smooth_l1_loss(model.places(images[known]), where),
        }

    def _conversations(
        self, features: Tensor, said: Batch, right: dict[str, list[float]]
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Summed loss and number of answer tokens; auxiliary losses of the question tokens."""
        model = self.model
        where = said.labels[:, 1:] >= 0
        labels = said.labels[:, 1:][where]
        asking = (said.turns >= 0) & (said.labels < 0)
        asking[said.mentions] = False  # these tokens predict the mentioned shape instead
        with torch.autocast("cpu", torch.bfloat16):
            before, last = model.hidden(features, said.ids)
            logits = model.decoder.lm_head(last[:, :-1][where]).float()
            question_words = model.vocabulary_logits(before[asking]).float()
            mentioned = before[said.mentions]
            mention_words = model.vocabulary_logits(mentioned).float()
        losses: dict[str, Tensor] = {}
        if self.ordinals is not None:
            shown = said.ids == IMAGE_TOKEN
            numbers = (shown.cumsum(1) - 1)[shown] // self.conversations.tokens_per_image
            losses["order"] = F.cross_entropy(self.ordinals(before[shown].float()), numbers)
        targets = said.answer_words[said.turns[asking]]
        losses["foretelling"] = QUESTION_WEIGHT * word_loss(question_words, targets)
        if len(said.mention_words):
            places = F.smooth_l1_loss(model.places(mentioned.float()), said.mention_places)
            words = word_loss(mention_words, said.mention_words)
            losses["calling"] = QUESTION_WEIGHT * (words + places)
        read = asking & before_answers(said.labels)
        number = model.numbers(before[read].float())[:, 0]
        losses["counting"] = F.smooth_l1_loss(number, said.shape_counts[said.turns[read]])
        wrong = said.turns[:, 1:][where][logits.argmax(-1) != labels].tolist()
        for turn, task in enumerate(said.tasks):
            right[task].append(turn not in wrong)
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels), losses


def train_answers(model: FastVLM, tokenizer: Tokenizer, out: Path) -> None:
    """Phases three and four: train projector and decoder, then the whole model.

    Phase three uses cached features of FEATURES scenes, phase four new scenes; BatchNorm statistics
    are frozen.
    """
    model.train()
    model.tower.eval()
    matrices = [p for p in model.decoder.model.layers.parameters() if p.ndim == 2]
    apart = {id(p) for p in (*model.tower.parameters(), *matrices)}
    others = [p for p in model.parameters() if id(p) not in apart]
    answer_loss = AnswerLoss(model, tokenizer)

    def encode(pixels: Tensor) -> Tensor:
        return model.tower(pixels)[1]

    cached = data.cached_features(out / "features.npy", FEATURES, scene, PREPARE, encode)

    def answer(chosen: np.ndarray) -> Loss:
        features = torch.from_numpy(cached[chosen]).float()
        return answer_loss.loss("decoder", features, [scene(int(seed)) for seed in chosen])

    groups = [{"params": others, "lr": 1e-3}]
    source = partial(data.choose, ANSWER_BATCH, count=FEATURES)
    train("decoder", model, groups, source, answer, DECODER_STEPS, out, matrices)

    def encode_and_answer(batch: tuple[Tensor, list[Scene]]) -> Loss:
        pixels, shown = batch
        middle, final = model.tower(pixels)
        loss, figures = answer_loss.loss("together", final, shown)
        head_losses = model.tower.loss(middle, final, shown)
        return loss + TOWER_WEIGHT * sum(head_losses.values()), figures

    def new_scenes(done: int) -> Iterator[tuple[Tensor, list[Scene]]]:
        return data.draw_batches(scene, PREPARE, ANSWER_BATCH, LATER // ANSWER_BATCH + done)

    groups = [{"params": list(model.parameters()), "lr": 2e-4}]
    train("together", model, groups, new_scenes, encode_and_answer, TOGETHER_STEPS, out)


def refine_answers(model: FastVLM, tokenizer: Tokenizer, out: Path) -> None:
    """Phase five: train projector and decoder on new scenes, with more pairs of images.

    The hidden states of image tokens, after half of the layers, also predict the image's number.
    """
    model.train()
    model.tower.eval()
    answer_loss = AnswerLoss(model, tokenizer)
    answer_loss.ordinals = nn.Linear(model.decoder.config.hidden_size, len(REFINING_IMAGES))
    answer_loss.conversations.shares |= REFINING_SHARES
    answer_loss.conversations.images = REFINING_IMAGES
    answer_loss.conversations.comparing = REFINING_COMPARING
    matrices = [p for p in model.decoder.model.layers.parameters() if p.ndim == 2]
    apart = {id(p) for p in (*model.tower.parameters(), *matrices)}
    learning = nn.ModuleList([model, answer_loss.ordinals])
    others = [p for p in learning.parameters() if id(p) not in apart]

    def answer(batch: tuple[Tensor, list[Scene]]) -> Loss:
        pixels, shown = batch
        with torch.no_grad():
            features = model.tower(pixels)[1]
        return answer_loss.loss("refining", features, shown)

    def new_scenes(done: int) -> Iterator[tuple[Tensor, list[Scene]]]:
        first = LATER // ANSWER_BATCH + TOGETHER_STEPS
        return data.draw_batches(scene, PREPARE, ANSWER_BATCH, first + done)

    groups = [{"params": others, "lr": 3e-4}]
    train("refining", learning, groups, new_scenes, answer, REFINING_STEPS, out, matrices, 7e-4)


def run(out: Path) -> FastVLM:
    """Run all phases and write the checkpoint to `out`/demo."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tower = Tower(crop=False)
    train_tower(tower, out)
    tokenizer = train_tokenizer(out)
    text = {**TEXT, "vocab_size": tokenizer.size}
    model = FastVLM(tower, text)
    train_answers(model, tokenizer, out)
    refine_answers(model, tokenizer, out)
    source = out / "source"
    write_apple_fastvlm(model, TOWER, text, SIDE, source)
    shutil.copy(out / "tokenizer.json", source)
    convert_fastvlm(source, out / "demo")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(chr(10))[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for states and logs")
    run(parser.parse_args().out)


if __name__ == "__main__":
    main()
