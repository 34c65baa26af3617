"""Scenes that differ in a single respect: a size, a position, or a count."""

import random
from collections.abc import Iterable
from dataclasses import replace

from questions import article, listed, place, plural
from world import COLOURS, KINDS, MARGIN, SIZES, Scene, Shape

COUNT = 4  # scenes per seed: original; another size; another position; one shape more
NEAR = 0.04  # largest distance of a shape's centre from that of its cell


def variations(seed: int) -> list[Scene]:
    """COUNT square scenes with one or two different shapes, all on the same background."""
    rng = random.Random(f"variations {seed}")
    cells = rng.sample(range(9), 4)
    (kind, other), (colour, another) = rng.sample(KINDS, 2), rng.sample(list(COLOURS), 2)
    size, new_size = rng.sample(list(SIZES), 2)
    shape = _shape(rng, kind, colour, size, cells[0])
    rest = [_shape(rng, other, another, rng.choice(list(SIZES)), cells[1])]
    rest = rest if rng.random() < 0.7 else []
    resized = replace(shape, size=new_size, radius=SIZES[new_size])
    moved = _shape(rng, kind, colour, size, cells[2])
    added = _shape(rng, kind, colour, size, cells[3])
    varied = ([shape], [_inside(resized)], [moved], [shape, added])
    return [Scene(seed, 1.0, 1.0, (*shapes, *rest), None) for shapes in varied]


def _shape(rng: random.Random, kind: str, colour: str, size: str, cell: int) -> Shape:
    """A shape near the centre of one of nine cells."""
    x, y = ((2 * i + 1) / 6 + rng.uniform(-NEAR, NEAR) for i in (cell % 3, cell // 3))
    radius = SIZES[size] * rng.uniform(0.95, 1.05)
    return _inside(Shape(kind, colour, size, x, y, radius, rng.uniform(-15, 15)))


def _inside(shape: Shape) -> Shape:
    """Move a shape so that it is entirely within the image."""
    low = shape.radius + MARGIN
    x, y = (min(max(v, low), 1 - low) for v in (shape.x, shape.y))
    return replace(shape, x=x, y=y)


def detailed(scene: Scene) -> str | None:
    """Caption with sizes, counts and places; None if it would be too long.

    Equal shapes are counted, and only single ones have a place. Only for square scenes: cropping
    moves the thirds of others.
    """
    if scene.width != scene.height:
        return None
    things = []
    for name, size in _kinds(scene.shapes):
        like = [s for s in scene.shapes if (s.name, s.size) == (name, size)]
        where = place(scene, like[0].x, like[0].y)
        if len(like) == 1 and where:
            things.append(f"{article(f'{size} {name}')} {where}")
        elif len(like) == 2:
            things.append(f"two {size} {plural(name)}")
        else:
            return None
    return listed(things) if len(things) <= 3 else None


def _kinds(shapes: Iterable[Shape]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((shape.name, shape.size) for shape in shapes))
