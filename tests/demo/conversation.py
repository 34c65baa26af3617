"""Training conversations about scenes: token ids and labels in FastVLM's prompt format."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harder_questions import ORDINALS, about, compare
from questions import Question, count, describe, thirds
from reference import cell, torch
from tasks import TASKS, ask
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from world import COLOURS, KINDS, Scene, Shape, scene

from mlx_fastvlm.models.fastvlm import IMAGE_TOKEN
from mlx_fastvlm.preprocess import tokenizer as runtime
from mlx_fastvlm.preprocess.chat_format import SYSTEM_PROMPT, Control, Image, encode, render

VOCABULARY = 640
IGNORED = -100  # label of tokens without loss
MAX_LENGTH = 1024
LENGTHS = 2  # parts of a batch, by length, that are padded separately
IMAGES = {1: 0.62, 2: 0.3, 3: 0.08}  # share of conversations by number of images
COMPARING = 0.4  # share of comparisons in conversations about two images
READING = 3.0  # factor on the share of "read" in conversations about several images


def train_tokenizer(directory: Path) -> runtime.Tokenizer:
    """Train a BPE tokenizer on questions and answers, without printed texts: these are spelled."""
    rng = random.Random(0)
    lines = [f"system\n{SYSTEM_PROMPT}", "user\n", "assistant\n"] * 100
    for seed in range(3000):
        plain = scene(seed, text=0)
        for task in TASKS:
            question = ask(plain, rng, task)
            if question is not None:
                asked = about(question.text, rng.choice(ORDINALS)) if seed % 4 else question.text
                lines += [asked, question.answer]
        compared = compare(plain, scene(seed + 3000, text=0), rng)
        if compared is not None:
            lines += [compared.text, compared.answer]
    added = [runtime.TEXT_END, runtime.TURN_START, runtime.TURN_END]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(runtime.WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(added),
            initial_alphabet=sorted(runtime.BYTES),
            show_progress=False,
        ),
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in added])
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(backend.to_str()), separators=(",", ":")))
    return runtime.read(directory)


@dataclass
class Conversation:
    """Questions and answers about one to three images.

    Attributes:
        tokens: Id, label and turn number of each token.
        asked: The questions, each with its scene; None for a comparison of two.
        images: Indices of its images in the batch.
    """

    tokens: list[tuple[int, int, int]]
    asked: list[tuple[Scene | None, Question]]
    images: list[int]


@dataclass
class Batch:
    """Conversations, padded to one length.

    Attributes:
        ids: Token ids (B, L), IMAGE_TOKEN for image embeddings.
        labels: (B, L), the id if it is part of an answer, else IGNORED.
        turns: (B, L), index of the token's question and answer in the batch, or -1.
        tasks: Task of each question.
        answer_words: (T, V), 1 for tokens of the answer and for words that describe its shapes.
        shape_counts: (T,), number of shapes that the answer depends on.
        mentions: Row and column of each token at which a question mentions a shape, (M,) each.
        mention_words: (M, V), 1 for words that describe the mentioned shape.
        mention_places: (M, 2), centre of the mentioned shape.
        images: Indices of the images in the batch of scenes, in order.
    """

    ids: Tensor
    labels: Tensor
    turns: Tensor
    tasks: list[str]
    answer_words: Tensor
    shape_counts: Tensor
    mentions: tuple[Tensor, Tensor]
    mention_words: Tensor
    mention_places: Tensor
    images: list[int]


class Conversations:
    """Turns scenes into conversations about one to three of them."""

    def __init__(self, tokenizer: runtime.Tokenizer, tokens_per_image: int, turns: int):
        """Set the largest number of questions per conversation, `turns`.

        The attributes `shares` (of the tasks), `images` and `comparing` can be changed.
        """
        self.shares = dict.fromkeys(TASKS, 1.0)
        self.images, self.comparing = IMAGES, COMPARING
        self.tokenizer, self.tokens_per_image, self.turns = tokenizer, tokens_per_image, turns
        self.end = tokenizer.added[runtime.TURN_END]

    def word_targets(self, scenes: list[Scene]) -> Tensor:
        """Targets (B, N, V): 1 for words that describe the shapes in the image token's cell."""
        grid = math.isqrt(self.tokens_per_image)
        target = torch.zeros(len(scenes), grid, grid, self.tokenizer.size)
        for b, shown in enumerate(scenes):
            for shape in shown.shapes:
                at, _ = cell(shown, shape.x, shape.y, grid, crop=False)
                target[b, *at, self._words(shown, shape)] = 1
        return target.flatten(1, 2)

    def pair_targets(self, scenes: list[Scene]) -> Tensor:
        """Targets (B, N, 48): 1 for colour and kind of the shapes in the image token's cell."""
        grid = math.isqrt(self.tokens_per_image)
        target = torch.zeros(len(scenes), grid, grid, len(COLOURS) * len(KINDS))
        for b, shown in enumerate(scenes):
            for shape in shown.shapes:
                at, _ = cell(shown, shape.x, shape.y, grid, crop=False)
                colour = list(COLOURS).index(shape.colour)
                target[b, *at, colour * len(KINDS) + KINDS.index(shape.kind)] = 1
        return target.flatten(1, 2)

    def place_targets(self, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Mask (B, N) of image tokens whose cell has one shape, and the centre of each, (M, 2)."""
        grid = math.isqrt(self.tokens_per_image)
        alone = torch.zeros(len(scenes), grid, grid)
        where = torch.zeros(len(scenes), grid, grid, 2)
        for b, shown in enumerate(scenes):
            for shape in shown.shapes:
                at, _ = cell(shown, shape.x, shape.y, grid, crop=False)
                alone[b, *at] += 1
                where[b, *at] = torch.tensor(_centre(shown, shape))
        return (alone == 1).flatten(1), where[alone == 1]

    def _words(self, shown: Scene | None, shape: Shape) -> list[int]:
        words = [shape.kind, shape.colour, shape.size]
        if shown is not None:
            words += thirds(shown, shape.x, shape.y)
        return [i for word in words for i in self.tokenizer.encode(f" {word}")]

    def batches(self, scenes: list[Scene], rng: random.Random) -> list[Batch]:
        """Divide the scenes among conversations, each used once, and batch them by length."""
        said = []
        start = 0
        for group in self._groups(scenes, rng):
            asked = list(self._questions(group, rng))
            tokens = self.encode(len(group), [question for _, question in asked])
            said.append(Conversation(tokens, asked, list(range(start, start + len(group)))))
            start += len(group)
        said.sort(key=lambda conversation: len(conversation.tokens))
        size = math.ceil(len(said) / LENGTHS)
        return [self._pad(said[i : i + size]) for i in range(0, len(said), size)]

    def _groups(self, scenes: list[Scene], rng: random.Random) -> Iterator[list[Scene]]:
        rest = list(scenes)
        while rest:
            (size,) = rng.choices(list(self.images), list(self.images.values()))
            yield rest[:size]
            rest = rest[size:]

    def _pad(self, said: list[Conversation]) -> Batch:
        length = max(len(each.tokens) for each in said)
        padding = (self.tokenizer.added[runtime.TEXT_END], IGNORED, -1)
        padded = [each.tokens + [padding] * (length - len(each.tokens)) for each in said]
        ids, labels, turns = torch.tensor(padded).unbind(-1)
        first = torch.tensor([0, *(len(each.asked) for each in said[:-1])]).cumsum(0)
        asked = [pair for each in said for pair in each.asked]
        answer_words = torch.zeros(len(asked), self.tokenizer.size)
        for row, (shown, question) in zip(answer_words, asked, strict=True):
            row[self.tokenizer.encode(question.answer)] = 1
            for thing in question.things:
                row[self._words(shown, thing)] = 1
        mentions = [(b, *each) for b, one in enumerate(said) for each in self._mentions(one)]
        mention_words = torch.zeros(len(mentions), self.tokenizer.size)
        for row, (_, _, shown, thing) in zip(mention_words, mentions, strict=True):
            row[self._words(shown, thing)] = 1
        return Batch(
            ids=ids,
            labels=labels,
            turns=torch.where(turns < 0, -1, turns + first[:, None]),
            tasks=[question.task for _, question in asked],
            answer_words=answer_words,
            shape_counts=torch.tensor([float(len(question.things)) for _, question in asked]),
            mentions=(
                torch.tensor([b for b, *_ in mentions]).long(),
                torch.tensor([at for _, at, *_ in mentions]).long(),
            ),
            mention_words=mention_words,
            mention_places=torch.tensor([_centre(*each) for _, _, *each in mentions]).reshape(
                -1, 2
            ),
            images=[i for each in said for i in each.images],
        )

    def _mentions(self, said: Conversation) -> Iterator[tuple[int, Scene, Shape]]:
        """Find tokens at which a question mentions a shape by colour and kind: the kind's token."""
        for at in range(1, len(said.tokens)):
            (first, _, _), (second, label, turn) = said.tokens[at - 1 : at + 1]
            if turn >= 0 and label < 0:
                shown, question = said.asked[turn]
                for thing in question.things if shown else ():
                    if [first, second] == self.tokenizer.encode(f" {thing.name}"):
                        yield at, shown, thing

    def _questions(
        self, group: list[Scene], rng: random.Random
    ) -> Iterator[tuple[Scene | None, Question]]:
        """Sample questions about one or two of the images; at least one."""
        for _ in range(rng.randint(1, self.turns) if rng.random() < 0.3 else self.turns):
            compares = len(group) == 2 and rng.random() < self.comparing
            compared = compare(group[0], group[1], rng) if compares else None
            if compared is not None:
                yield None, compared
                continue
            index = rng.randrange(len(group))
            question = self._question(group[index], rng, several=len(group) > 1)
            if len(group) > 1:
                question = replace(question, text=about(question.text, ORDINALS[index]))
            yield group[index], question

    def _question(self, shown: Scene, rng: random.Random, *, several: bool) -> Question:
        """Sample a question about one image; a description if the sampled task has none."""
        shares = self.shares | ({"read": READING * self.shares["read"]} if several else {})
        (task,) = rng.choices(list(shares), list(shares.values()))
        question = ask(shown, rng, task)
        if question is not None and task == "count":  # fewer counts of single shapes
            question = max(question, count(shown, rng), key=lambda q: len(q.things))
        return question or describe(shown, rng)

    def encode(self, images: int, asked: list[Question]) -> list[tuple[int, int, int]]:
        """Ids, labels and turn numbers; only answers and their end tokens have labels.

        A turn begins after the images.
        """
        result: list[tuple[int, int, int]] = []

        def add_unlabelled(parts: list[str | Control | Image]) -> None:
            ids = encode(parts, self.tokenizer, self.tokens_per_image, MAX_LENGTH)
            start = max((k + 1 for k, token in enumerate(ids) if token == IMAGE_TOKEN), default=0)
            result.extend((t, IGNORED, i if k >= start else -1) for k, t in enumerate(ids))

        for i, question in enumerate(asked):
            if i == 0:
                add_unlabelled(render(question.text, images))
            else:
                start, end = Control(runtime.TURN_START), Control(runtime.TURN_END)
                user = f"user\n{question.text}"
                add_unlabelled(["\n", start, user, end, "\n", start, "assistant\n"])
            answer = [*self.tokenizer.encode(question.answer), self.end]
            result.extend((token, token, i) for token in answer)
        return result


def _centre(shown: Scene, shape: Shape) -> tuple[float, float]:
    """Centre of a shape, scaled to [-2, 2]."""
    return 4 * shape.x / shown.width - 2, 4 * shape.y / shown.height - 2
