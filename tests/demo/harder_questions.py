"""Questions about relations, pairs of images and JSON output, with their answers.

As for the simpler ones, each has one right answer: close calls are not asked.
"""

import json
import random
from collections.abc import Callable
from itertools import pairwise

from questions import (
    Question,
    article,
    colour,
    count,
    describe,
    listed,
    missing,
    plural,
    presence,
    read,
    shape,
)
from world import KINDS, WORDS, Scene, Shape

BESIDE = 0.05  # least distance of two centres along an axis, for one to be beside the other
IN_ORDER = 0.02  # least distance of two centres, for a visible order from left to right
SIDES: dict[str, Callable[[Shape, Shape], float]] = {  # distance of a on that side of b
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}
ORDINALS = ("first", "second", "third")
AS_JSON = ("Answer as JSON.", "Answer in JSON.")


def relation(scene: Scene, rng: random.Random) -> Question | None:
    """Ask what is on one side of a shape."""
    side = rng.choice(list(SIDES))
    text = rng.choice(
        ("What is {} the {}?", "What do you see {} the {}?", "Which shapes are {} the {}?")
    )
    if rng.random() < 0.12:
        name = missing(scene, rng)
        return Question("relation", text.format(side, name), f"There is no {name}.")
    thing = rng.choice(scene.shapes)
    others = [other for other in scene.shapes if other is not thing]
    if thing.name in [other.name for other in others]:
        return None
    alone = thing.kind not in [other.kind for other in others]
    name = thing.kind if alone and rng.random() < 0.5 else thing.name
    distances = [SIDES[side](other, thing) for other in others]
    if min(map(abs, distances), default=1) < BESIDE:
        return None
    found = [other for other, far in zip(others, distances, strict=True) if far > 0]
    found.sort(key=lambda other: other.x)
    if any(b.x - a.x < IN_ORDER for a, b in pairwise(found)):
        return None
    things = listed([article(other.name) for other in found]) if found else "nothing"
    verb = "are" if len(found) > 1 else "is"
    answer = f"{things[0].upper()}{things[1:]} {verb} {side} the {name}."
    return Question("relation", text.format(side, name), answer, (thing, *found))


def structured(scene: Scene, rng: random.Random) -> Question | None:
    """Ask one of the simpler questions, to be answered as JSON; null stands for absent things."""
    simple = rng.choice((count, colour, shape, presence, read, describe))(scene, rng)
    if simple is None:
        return None
    thing = simple.things[0] if simple.things else None
    says = scene.text.content if scene.text else None
    values: dict[str, dict[str, object]] = {
        "count": {"count": len(simple.things)},
        "colour": {"colour": thing and thing.colour},
        "shape": {"shape": thing and thing.kind},
        "presence": {"present": thing is not None},
        "read": {"text": says},
        "describe": {"shapes": _as_values(scene), "text": says},
    }
    text = f"{simple.text} {rng.choice(AS_JSON)}"
    return Question("structured", text, json.dumps(values[simple.task]), simple.things)


def _as_values(scene: Scene) -> list[dict[str, str]]:
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    return [{"size": s.size, "colour": s.colour, "shape": s.kind} for s in shapes]


def about(text: str, ordinal: str) -> str:
    """Rephrase a question to be about one of several images."""
    for image in ("the image", "this image"):
        if image in text:
            return text.replace(image, f"the {ordinal} image")
    return f"{text[:-1]} in the {ordinal} image{text[-1]}"


def compare(first: Scene, second: Scene, rng: random.Random) -> Question | None:
    """Ask which of two images has more shapes, a shape or a text, or whether colours agree."""
    return rng.choice((_more, _has, _has, _says, _same_colour))((first, second), rng)


def _more(scenes: tuple[Scene, Scene], rng: random.Random) -> Question:
    kind = rng.choice(KINDS) if rng.random() < 0.5 else None
    found = [[s for s in scene.shapes if kind in (None, s.kind)] for scene in scenes]
    singular, several = ("shape", "shapes") if kind is None else (kind, plural(kind))
    a, b = map(len, found)
    if a != b:
        answer = f"The {'first' if a > b else 'second'} image has more {several}."
    elif a == 0:
        answer = f"Neither image has a {singular}."
    else:
        answer = f"Both images have {a} {singular if a == 1 else several}."
    return _comparison(f"Which image has more {several}?", answer, [s for f in found for s in f])


def _has(scenes: tuple[Scene, Scene], rng: random.Random) -> Question:
    whole = rng.random() < 0.5  # colour and kind; else the kind alone
    names = [[s.name if whole else s.kind for s in scene.shapes] for scene in scenes]
    name = rng.choice(
        names[0] + names[1] + [missing(rng.choice(scenes), rng) if whole else rng.choice(KINDS)]
    )
    there = tuple(name in each for each in names)
    things = [s for scene in scenes for s in scene.shapes if name in (s.name, s.kind)]
    text = rng.choice(("Which image has {}?", "Which image shows {}?")).format(article(name))
    return _comparison(text, f"{_which(there, 'has', 'have')} {article(name)}.", things)


def _says(scenes: tuple[Scene, Scene], rng: random.Random) -> Question | None:
    printed = [scene.text.content if scene.text else None for scene in scenes]
    said = [text for text in printed if text is not None]
    if not said:
        return None
    wanted = rng.choice(WORDS) if rng.random() < 0.2 else rng.choice(said)
    there = (printed[0] == wanted, printed[1] == wanted)
    answer = f"{_which(there, 'says', 'say')} {wanted}."
    return _comparison(f"Which image says {wanted}?", answer, [])


def _same_colour(scenes: tuple[Scene, Scene], rng: random.Random) -> Question | None:
    once = [
        {s.kind: s for s in scene.shapes if sum(o.kind == s.kind for o in scene.shapes) == 1}
        for scene in scenes
    ]
    kinds = sorted(once[0].keys() & once[1].keys())
    if not kinds:
        return None
    kind = rng.choice(kinds)
    first, second = once[0][kind], once[1][kind]
    if first.colour == second.colour:
        answer = f"Yes, both are {first.colour}."
    else:
        answer = f"No, the first is {first.colour} and the second is {second.colour}."
    text = f"Is the {kind} the same colour in both images?"
    return _comparison(text, answer, [first, second])


def _which(there: tuple[bool, ...], singular: str, several: str) -> str:
    """The beginning of an answer: which of two images, and a verb in the singular or plural."""
    if all(there):
        return f"Both images {several}"
    if not any(there):
        return f"Neither image {singular}"
    return f"Only the {'first' if there[0] else 'second'} image {singular}"


def _comparison(text: str, answer: str, things: list[Shape]) -> Question:
    return Question("compare", text, answer, tuple(things))
