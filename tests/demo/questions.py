"""Questions about one shape or a whole scene, with their answers.

Every question has one right answer that is visible in the image: ambiguous shapes and positions
near a border are not asked about. About one question in eight is about something that is absent,
and the answer says so.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from world import COLOURS, KINDS, Scene, Shape

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
CLEARANCE = 0.05  # least distance of a centre from the borders of the nine places
APART = 0.15  # least distance of two centres along an axis, for a relation


@dataclass(frozen=True)
class Question:
    """A question and its only right answer.

    `things` are the shapes that the answer depends on.
    """

    task: str
    text: str
    answer: str
    things: tuple[Shape, ...] = ()


def place(scene: Scene, x: float, y: float) -> str | None:
    """Name of one of nine places in the image; None too near a border between two."""
    for value, extent in ((y, scene.height), (x, scene.width)):
        third = extent / 3
        if min(abs(value - third), abs(value - 2 * third)) < CLEARANCE:
            return None
    row, column = thirds(scene, x, y)
    if (row, column) == ("middle", "centre"):
        return "in the centre"
    return f"at the {row} {column}"


def thirds(scene: Scene, x: float, y: float) -> tuple[str, str]:
    """Names of the row and the column of a point, of three each."""
    row, column = (min(2, int(3 * v / n)) for v, n in ((y, scene.height), (x, scene.width)))
    return ROWS[row], COLUMNS[column]


def article(noun: str) -> str:
    """Prefix a noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("cross") else f"{kind}s"


def _there_are(count: int, one: str, many: str) -> str:
    if count == 0:
        return f"There are no {many}."
    return f"There is 1 {one}." if count == 1 else f"There are {count} {many}."


def count(scene: Scene, rng: random.Random) -> Question:
    """Ask for the number of shapes, of all or of one kind or colour."""
    which = rng.random()
    if which < 0.3:
        one, many, things = "shape", "shapes", list(scene.shapes)
    elif which < 0.75:
        kind = rng.choice(scene.shapes).kind if rng.random() < 0.8 else rng.choice(KINDS)
        one, many = kind, plural(kind)
        things = [s for s in scene.shapes if s.kind == kind]
    else:
        colour = (
            rng.choice(scene.shapes).colour if rng.random() < 0.8 else rng.choice(list(COLOURS))
        )
        one, many = f"{colour} shape", f"{colour} shapes"
        things = [s for s in scene.shapes if s.colour == colour]
    text = rng.choice(
        ("How many {} are there?", "How many {} do you see?", "Count the {}.",
         "How many {} are in the image?")
    ).format(many)  # fmt: skip
    answer = _there_are(len(things), one, many)
    return Question("count", text, answer, tuple(things))


def _only(
    scene: Scene, rng: random.Random, attribute: str, names: Iterable[str]
) -> tuple[str, Shape | None] | None:
    """A name that exactly one shape has, and that shape; or a name of no shape, and None."""
    named = [getattr(shape, attribute) for shape in scene.shapes]
    if rng.random() < 0.12:
        return rng.choice([name for name in names if name not in named]), None
    once = [(n, s) for n, s in zip(named, scene.shapes, strict=True) if named.count(n) == 1]
    return rng.choice(once) if once else None


def colour(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the colour of the only shape of its kind."""
    found = _only(scene, rng, "kind", KINDS)
    if found is None:
        return None
    kind, thing = found
    text = rng.choice(
        ("What colour is the {}?", "What is the colour of the {}?", "Which colour is the {}?",
         "What color is the {}?")
    ).format(kind)  # fmt: skip
    if thing is None:
        return Question("colour", text, f"There is no {kind}.")
    return Question("colour", text, f"The {kind} is {thing.colour}.", (thing,))


def shape(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the kind of the only shape of its colour."""
    found = _only(scene, rng, "colour", COLOURS)
    if found is None:
        return None
    colour, thing = found
    text = rng.choice(
        ("What shape is the {} object?", "What is the {} shape?", "Which shape is {}?",
         "What is {} in this image?")
    ).format(colour)  # fmt: skip
    if thing is None:
        return Question("shape", text, f"There is no {colour} shape.")
    return Question("shape", text, f"The {colour} shape is a {thing.kind}.", (thing,))


def unique(scene: Scene) -> list[Shape]:
    return [s for s in scene.shapes if sum(o.name == s.name for o in scene.shapes) == 1]


def missing(scene: Scene, rng: random.Random) -> str:
    """Name of a shape that is absent, often with a colour and a kind that are present."""
    colours = [s.colour for s in scene.shapes] if rng.random() < 0.5 else list(COLOURS)
    kinds = [s.kind for s in scene.shapes] if rng.random() < 0.5 else list(KINDS)
    names = {f"{c} {k}" for c in colours for k in kinds} - {s.name for s in scene.shapes}
    if names:
        return rng.choice(sorted(names))
    return missing(scene, rng)


def position(scene: Scene, rng: random.Random) -> Question | None:
    """Ask where a shape is, or whether it is left of, right of, above or below another."""
    things = unique(scene)
    if not things:
        return None
    if len(things) > 1 and rng.random() < 0.4:
        return _relation(things, rng)
    text = rng.choice(
        ("Where is the {}?", "Where do you see the {}?", "Where in the image is the {}?")
    )
    if rng.random() < 0.12:
        name = missing(scene, rng)
        return Question("position", text.format(name), f"There is no {name}.")
    thing = rng.choice(things)
    where = place(scene, thing.x, thing.y)
    if where is None:
        return None
    answer = f"The {thing.name} is {where}."
    return Question("position", text.format(thing.name), answer, (thing,))


def _relation(things: list[Shape], rng: random.Random) -> Question | None:
    a, b = rng.sample(things, 2)
    relation = rng.choice(("left of", "right of", "above", "below"))
    distance = b.x - a.x if relation in ("left of", "right of") else b.y - a.y
    if relation in ("right of", "below"):
        distance = -distance
    if abs(distance) < APART:
        return None
    text = f"Is the {a.name} {relation} the {b.name}?"
    yes = "Yes" if distance > 0 else "No"
    says = "is" if distance > 0 else "is not"
    answer = f"{yes}, the {a.name} {says} {relation} the {b.name}."
    return Question("position", text, answer, (a, b))


def size(scene: Scene, rng: random.Random) -> Question | None:
    """Ask which of two shapes is larger, or for the size of one."""
    things = unique(scene)
    if not things:
        return None
    if len(things) > 1 and rng.random() < 0.6:
        a, b = rng.sample(things, 2)
        text = rng.choice(
            ("Which is larger, the {} or the {}?", "What is bigger, the {} or the {}?")
        ).format(a.name, b.name)
        if a.size == b.size:
            return Question("size", text, "They are the same size.", (a, b))
        larger = a.name if a.radius > b.radius else b.name
        return Question("size", text, f"The {larger} is larger.", (a, b))
    thing = rng.choice(things)
    text = rng.choice(("How large is the {}?", "What size is the {}?", "How big is the {}?"))
    answer = f"The {thing.name} is {thing.size}."
    return Question("size", text.format(thing.name), answer, (thing,))


def presence(scene: Scene, rng: random.Random) -> Question:
    """Ask whether a kind, a colour, or a shape of a colour is present."""
    level, there = rng.random(), rng.random() < 0.5
    if level < 0.3:
        present = [s.kind for s in scene.shapes]
        absent = [k for k in KINDS if k not in present]
    elif level < 0.5:
        present = [f"{s.colour} shape" for s in scene.shapes]
        absent = [f"{c} shape" for c in COLOURS if f"{c} shape" not in present]
    else:
        present, absent = [s.name for s in scene.shapes], [missing(scene, rng)]
    name = rng.choice(present if there else absent)
    things = tuple(s for s, n in zip(scene.shapes, present, strict=True) if n == name)
    text = rng.choice(("Is there {}?", "Do you see {}?", "Can you see {} in the image?")).format(
        article(name)
    )
    answer = f"Yes, there is {article(name)}." if there else f"No, there is no {name}."
    return Question("presence", text, answer, things)


def read(scene: Scene, rng: random.Random) -> Question:
    """Ask for the printed word or number."""
    text = rng.choice(
        ("What does the text say?", "Read the text.", "What is written in the image?",
         "What text do you see?")
    )  # fmt: skip
    if scene.text is None:
        return Question("read", text, "There is no text.")
    return Question("read", text, f"The text says {scene.text.content}.")


def describe(scene: Scene, rng: random.Random) -> Question:
    """Ask for a description of the image."""
    text = rng.choice(("Describe the image.", "What do you see?", "What is in this image?"))
    return Question("describe", text, description(scene), scene.shapes)


def description(scene: Scene) -> str:
    """Describe a scene: the shapes from left to right, then the text."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    things = listed([article(f"{shape.size} {shape.name}") for shape in shapes])
    says = f" The text says {scene.text.content}." if scene.text else ""
    return f"{things[0].upper()}{things[1:]}.{says}"


def listed(things: list[str]) -> str:
    """Join phrases: "a, b and c"."""
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
