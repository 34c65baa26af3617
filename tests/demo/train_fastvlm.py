"""Train the FastVLM demo model: first the tower, then projector and decoder.

    PYTHONPATH=. python tests/demo/train_fastvlm.py --out DIR

Run it again after an interruption: it goes on where it last saved.
"""

import argparse
import random
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import data
from conversation import Batch, Conversations, train_tokenizer
from export import convert_fastvlm, write_apple_fastvlm
from questions import TASKS
from reference import TOWER, F, FastVLM, Tower, torch
from torch import Tensor, nn
from training import train
from world import Scene, scene

from mlx_fastvlm.preprocess.tokenizer import Tokenizer
from mlx_mobileclip.preprocess.image import resize_pad

SIDE = 256
SCENES, FEATURES = 60_000, 24_000  # the decoder learns from the latter
TEXT = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 448,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TOWER_STEPS, PLACES_STEPS, TOWER_BATCH = 2400, 600, 32
DECODER_STEPS, ANSWER_STEPS, COUNTING_STEPS, ANSWER_BATCH = 3000, 2200, 1200, 16
RECOUNTING_STEPS = 1600
TURNS = 7  # questions in a conversation
# How often tasks are asked in phases four to six; others 0.7, 0.6 and 0.7.
HARDER = {"count": 1.5, "position": 1.5, "size": 1.2, "read": 1.2, "describe": 0.3}
COUNTING = {"count": 4.0, "read": 1.0, "describe": 0.3}
RECOUNTING = {"count": 3.0, "read": 1.0, "describe": 0.6}
SHOWING = 50.0  # weight of the losses that tie image tokens to words
FORETELLING = 3.0  # weight of the loss that ties a question's tokens to the words of its answer

Loss = tuple[Tensor, dict[str, float]]


def train_tower(tower: Tower, scenes: data.Scenes, out: Path) -> None:
    """Phases one and two: the tower learns to name what it sees, then also where in the scene.

    The second is apart because naming what is in a cell needs its surroundings only.
    """
    tower.train()

    def step(batch: Any, left_out: tuple[str, ...] = ()) -> Loss:
        pixels, shown = batch
        losses = tower.loss(*tower(pixels), shown)
        taught = [value for name, value in losses.items() if name not in left_out]
        return sum(taught), {name: value.item() for name, value in losses.items()}

    parameters, source = list(tower.parameters()), partial(scenes.batches, TOWER_BATCH)
    groups = [{"params": parameters, "lr": 3e-3}]
    train("tower", tower, groups, source, partial(step, left_out=("where",)), TOWER_STEPS, out)
    groups = [{"params": parameters, "lr": 1e-3}]
    train("places", tower, groups, source, step, PLACES_STEPS, out)


def naming(logits: Tensor, words: Tensor) -> Tensor:
    """How far logits are from telling which few words apply."""
    return F.binary_cross_entropy_with_logits(logits, words, pos_weight=torch.tensor(10.0))


def before_answers(labels: Tensor) -> Tensor:
    """Which tokens are among the last five before an answer: those that end its question."""
    answered = F.pad((labels >= 0).float(), (0, 5))[:, None]
    return F.max_pool1d(answered, 6, stride=1)[:, 0] > 0


class Teaching:
    """The loss of phases three to six: the answers, and what helps to find them."""

    def __init__(self, model: FastVLM, tokenizer: Tokenizer):
        """Teach `model` with conversations in the tokens of `tokenizer`."""
        self.model = model
        self.conversations = Conversations(tokenizer, (SIDE // 64) ** 2, TURNS)

    def loss(self, phase: str, features: Tensor, shown: list[Scene]) -> Loss:
        """Loss of a batch of scenes, whose features are given, and what to log."""
        rng = random.Random(f"{phase} {sum(scene.seed for scene in shown)}")
        right: dict[str, list[float]] = defaultdict(list)
        answers, count = torch.zeros(()), 0
        losses: dict[str, Tensor] = self._images(features, shown)
        batches = self.conversations.batches(shown, rng)
        for said in batches:
            summed, tokens, taught = self._conversations(features[said.images], said, right)
            answers, count = answers + summed, count + tokens
            for name, value in taught.items():
                losses[name] = losses.get(name, torch.zeros(())) + value / len(batches)
        answers = answers / count
        figures = {"loss": answers.item()}
        figures |= {task: sum(found) / len(found) for task, found in sorted(right.items())}
        figures |= {name: value.item() for name, value in losses.items()}
        return answers + sum(losses.values()), figures

    def _images(self, features: Tensor, shown: list[Scene]) -> dict[str, Tensor]:
        """Image tokens that resemble the words for what they show are soon found by them."""
        model, conversations = self.model, self.conversations
        images = model.project(features)
        losses = {
            "naming": SHOWING * naming(model.named(images), conversations.named(shown)),
            "pairs": SHOWING * naming(model.pairs(images), conversations.pairs(shown)),
        }
        if model.places is not None:
            known, where = conversations.places(shown)
            losses["places"] = F.smooth_l1_loss(model.places(images[known]), where)
        return losses

    def _conversations(
        self, features: Tensor, said: Batch, right: dict[str, list[float]]
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Summed loss of the answers and their tokens; losses of the questions' tokens."""
        model = self.model
        where = said.labels[:, 1:] >= 0
        labels = said.labels[:, 1:][where]
        asking = (said.turns >= 0) & (said.labels < 0)
        if model.places is not None:
            asking[said.names] = False  # these tokens tell of one thing
        with torch.autocast("cpu", torch.bfloat16):
            before, last = model.hidden(features, said.ids)
            logits = model.decoder.lm_head(last[:, :-1][where]).float()
            foretold = model.named(before[asking]).float()
            named = before[said.names]
            called = model.named(named).float()
        losses = {"foretelling": FORETELLING * naming(foretold, said.words[said.turns[asking]])}
        if model.places is not None and len(said.called):
            places = F.smooth_l1_loss(model.places(named.float()), said.places)
            losses["calling"] = FORETELLING * (naming(called, said.called) + places)
        if model.numbers is not None:
            read = asking & before_answers(said.labels)
            number = model.numbers(before[read].float())[:, 0]
            losses["counting"] = F.smooth_l1_loss(number, said.numbers[said.turns[read]])
        wrong = said.turns[:, 1:][where][logits.argmax(-1) != labels].tolist()
        for turn, task in enumerate(said.tasks):
            right[task].append(turn not in wrong)
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels), losses


def train_answers(model: FastVLM, tokenizer: Tokenizer, scenes: data.Scenes, out: Path) -> None:
    """Phases three to six: projector and decoder learn to answer from what the tower sees.

    In the fourth they are also taught where exactly each thing is, and which words and which
    place belong to each thing that a question names: what it takes to compare two of them. The
    last two are about counting.
    """
    model.tower.eval()
    matrices = [p for p in model.decoder.model.layers.parameters() if p.ndim == 2]
    apart = {id(p) for p in (*model.tower.parameters(), *matrices)}
    others = [p for p in model.parameters() if id(p) not in apart]
    teaching = Teaching(model, tokenizer)
    seen = data.looked_at(out / "features.npy", scenes, FEATURES, lambda x: model.tower(x)[1])

    def phase(name: str, steps: int) -> None:
        def step(batch: Any) -> Loss:
            chosen, shown = batch
            return teaching.loss(name, torch.from_numpy(seen[chosen]).float(), shown)

        source = partial(scenes.choices, ANSWER_BATCH, count=FEATURES)
        groups = [{"params": others, "lr": 1e-3}]
        train(name, model, groups, source, step, steps, out, matrices)

    phase("decoder", DECODER_STEPS)
    teaching.conversations.shares = [HARDER.get(task, 0.7) for task in TASKS]
    model.places = nn.Linear(TEXT["hidden_size"], 2)
    others += model.places.parameters()
    phase("answers", ANSWER_STEPS)
    teaching.conversations.shares = [COUNTING.get(task, 0.6) for task in TASKS]
    teaching.conversations.higher = True
    model.numbers = nn.Linear(TEXT["hidden_size"], 1)
    others += model.numbers.parameters()
    phase("counting", COUNTING_STEPS)
    teaching.conversations.shares = [RECOUNTING.get(task, 0.7) for task in TASKS]
    phase("recounting", RECOUNTING_STEPS)


def run(out: Path) -> FastVLM:
    """Every phase, and the checkpoint in `out`/demo."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tower = Tower(crop=False)
    scenes = data.Scenes(out / "scenes.bin", SCENES, scene, partial(resize_pad, size=SIDE), SIDE)
    train_tower(tower, scenes, out)
    tokenizer = train_tokenizer(out)
    text = {**TEXT, "vocab_size": tokenizer.size}
    model = FastVLM(tower, text)
    train_answers(model, tokenizer, scenes, out)
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
