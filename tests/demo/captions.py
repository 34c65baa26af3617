"""Captions of scenes: of everything in them, or of one thing."""

import random
from dataclasses import dataclass

from questions import article, description, listed
from world import COLOURS, KINDS, Scene

LABELS = tuple(f"{colour} {kind}" for colour in COLOURS for kind in KINDS)
OPENINGS = ("", "", "a photo of ", "a picture of ", "an image of ")


@dataclass(frozen=True)
class Caption:
    """A text, and the names of the things it speaks of; `whole` if it leaves none out."""

    text: str
    names: tuple[str, ...]
    whole: bool

    def is_true_of(self, scene: Scene) -> bool:
        """Whether it could be said of a scene, as far as names tell."""
        names = sorted(shape.name for shape in scene.shapes)
        return names == sorted(self.names) if self.whole else self.names[0] in names


def caption(scene: Scene, rng: random.Random) -> Caption:
    """Half the time the full description, else one in other words or of one thing only."""
    names = [shape.name for shape in scene.shapes]
    kind = rng.random()
    if kind < 0.5:
        return Caption(description(scene), tuple(names), whole=True)
    if kind < 0.65:
        rng.shuffle(names)
        things = listed([article(name) for name in names])
        return Caption(rng.choice(OPENINGS) + things, tuple(names), whole=True)
    name = rng.choice(names)
    return Caption(rng.choice(OPENINGS) + article(name), (name,), whole=False)
