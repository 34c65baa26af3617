"""Captions of scenes: of everything in them, or of one thing."""

import random
from dataclasses import dataclass

from questions import article, description, listed
from variations import detailed
from world import COLOURS, KINDS, Scene

LABELS = tuple(f"{colour} {kind}" for colour in COLOURS for kind in KINDS)
DETAILED = 0.7  # share of captions with sizes, positions and numbers, where `detailed` has one
OPENINGS = ("", "", "a photo of ", "a picture of ", "an image of ")


@dataclass(frozen=True)
class Caption:
    """A text, and the names of the things it speaks of.

    Attributes:
        text: What is said.
        names: Colour and kind of each thing.
        exact: What only scenes with the same description, or the same details, can be said to
            show; None if names alone matter.
        whole: Whether it leaves nothing out.
    """

    text: str
    names: tuple[str, ...]
    exact: str | None = None
    whole: bool = True

    def is_true_of(self, scene: Scene) -> bool:
        """Whether it could be said of a scene."""
        if self.exact is not None:
            return self.exact in (description(scene), detailed(scene))
        names = sorted(shape.name for shape in scene.shapes)
        return names == sorted(self.names) if self.whole else self.names[0] in names


def caption(scene: Scene, rng: random.Random) -> Caption:
    """A description, the same in other words, one with details, or one of a single shape."""
    names = [shape.name for shape in scene.shapes]
    if rng.random() < DETAILED and (said := detailed(scene)):
        return Caption(rng.choice(OPENINGS) + said, tuple(names), said)
    kind = rng.random()
    if kind < 0.5:
        said = description(scene)
        return Caption(said, tuple(names), said)
    if kind < 0.65:
        rng.shuffle(names)
        things = listed([article(name) for name in names])
        return Caption(rng.choice(OPENINGS) + things, tuple(names))
    name = rng.choice(names)
    return Caption(rng.choice(OPENINGS) + article(name), (name,), whole=False)
