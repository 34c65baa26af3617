"""Captions of scenes: of the whole scene, or of one shape."""

import random
from dataclasses import dataclass

from questions import article, description, listed
from variations import detailed
from world import COLOURS, KINDS, Scene

LABELS = tuple(f"{colour} {kind}" for colour in COLOURS for kind in KINDS)
DETAILED = 0.7  # share of detailed captions (sizes, positions, counts) where the scene has one
OPENINGS = ("", "", "a photo of ", "a picture of ", "an image of ")


@dataclass(frozen=True)
class Caption:
    """A caption and the shapes that it mentions.

    Attributes:
        text: The caption.
        names: Colour and kind of each mentioned shape.
        exact: The description or detailed caption that a scene must have for the caption to be
            true; None if the shapes decide alone.
        whole: Whether it mentions every shape of the scene.
    """

    text: str
    names: tuple[str, ...]
    exact: str | None = None
    whole: bool = True

    def is_true_of(self, scene: Scene) -> bool:
        """Whether the caption is true of a scene."""
        if self.exact is not None:
            return self.exact in (description(scene), detailed(scene))
        names = sorted(shape.name for shape in scene.shapes)
        return names == sorted(self.names) if self.whole else self.names[0] in names


def caption(scene: Scene, rng: random.Random) -> Caption:
    """A random caption: a description, a detailed one, a list of the shapes, or a single shape."""
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
