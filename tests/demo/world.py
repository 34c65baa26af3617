"""The synthetic world of the demo models: scenes of coloured shapes and printed text.

A scene depends only on its seed, so a set of scenes is a range of seeds. Training uses seeds below
HELD_OUT, evaluation those from HELD_OUT on.

Lengths are fractions of the image's longer side; (0, 0) is its top left corner.
"""

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HELD_OUT = 1_000_000_000

KINDS = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 225, 40),
    "green": (40, 160, 65),
    "blue": (35, 85, 210),
    "purple": (130, 50, 160),
    "black": (18, 18, 20),
    "white": (248, 248, 245),
}
SIZES = {"small": 0.06, "medium": 0.095, "large": 0.14}  # radius
WORDS = """
ANT APPLE BEAR BIRD BOAT BOOK BREAD CAKE CAT CHAIR CLOUD COAT CUP DESK DOG DOOR DUCK EGG
FISH FLAG FOX FROG GATE GOAT HAT HORSE HOUSE ICE JAM KEY KING KITE LAMP LEAF LION MAP
MILK MOON MOUSE NEST NIGHT NOSE OWL PARK PEN PIG QUEEN RAIN RING ROAD SALT SHIP SHOE
SNOW SUN TENT TIGER TRAIN TREE VAN WIND WOLF YARN ZEBRA
""".split()  # noqa: SIM905

GAP = 0.015  # least distance between two things
MARGIN = 0.01  # least distance to the image's edge
LONG_SIDES = (240, 480)  # px
SHORT_SIDES = (0.6, 1.0)
OVERSAMPLING = 3  # factor by which shapes are drawn larger and then averaged

Box = tuple[float, float, float, float]  # centre, half the width, half the height


@dataclass(frozen=True)
class Shape:
    """A coloured shape with centre (x, y); `radius` is half its width, `angle` in degrees."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Text:
    """A printed word or number with centre (x, y)."""

    content: str
    x: float
    y: float
    width: float
    height: float
    font_size: float

    @property
    def letters(self) -> list[tuple[str, float, float]]:
        """Each character and its centre."""
        start, scale = self.x - self.width / 2, self.width / _font(100).getlength(self.content)
        ends = [_font(100).getlength(self.content[: i + 1]) for i in range(len(self.content))]
        starts = [0.0, *ends[:-1]]
        middles = [(a + b) / 2 * scale + start for a, b in zip(starts, ends, strict=True)]
        return [(c, x, self.y) for c, x in zip(self.content, middles, strict=True)]


@dataclass(frozen=True)
class Scene:
    """The contents of an image; `width` and `height` in fractions of the longer side."""

    seed: int
    width: float
    height: float
    shapes: tuple[Shape, ...]
    text: Text | None


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # included in Pillow, so the same on every machine
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def scene(
    seed: int, shapes: tuple[int, int] = (1, 5), text: float = 0.5, *, central: bool = False
) -> Scene:
    """Sample a scene.

    Args:
        seed: Seed of the random generator.
        shapes: Smallest and largest number of shapes; there may be fewer for lack of space.
        text: Probability of a printed text.
        central: Whether everything is in the central square, which remains after cropping.
    """
    rng = random.Random(seed)
    short = rng.uniform(*SHORT_SIDES)
    width, height = (1.0, short) if rng.random() < 0.5 else (short, 1.0)
    taken: list[Box] = []
    if central:  # keep both ends of the longer side free
        end = (1 - short) / 2
        if width > height:
            taken += [(0, height / 2, end, height), (1, height / 2, end, height)]
        else:
            taken += [(width / 2, 0, width, end), (width / 2, 1, width, end)]
    printed = _text(rng, width, height, taken) if rng.random() < text else None
    placed: list[Shape] = []
    count = rng.randint(*shapes)
    size_names = list(SIZES)
    while len(placed) < count and size_names:
        shape = _shape(rng, width, height, taken, rng.choice(size_names))
        if shape is not None:
            placed.append(shape)
        else:  # no space for this size: try only smaller ones from now on
            size_names = size_names[:-1]
    return Scene(seed, width, height, tuple(placed), printed)


def _text(rng: random.Random, width: float, height: float, taken: list[Box]) -> Text:
    content = (
        rng.choice(WORDS) if rng.random() < 0.6 else str(rng.randrange(10 ** rng.randint(1, 3)))
    )
    size = rng.uniform(0.11, 0.15)
    w, h = _font(100).getlength(content) / 100 * size, 0.8 * size
    while True:
        x = rng.uniform(w / 2 + MARGIN, width - w / 2 - MARGIN)
        y = rng.uniform(h / 2 + MARGIN, height - h / 2 - MARGIN)
        if _free(x, y, w / 2, h / 2, taken):
            taken.append((x, y, w / 2, h / 2))
            return Text(content, x, y, w, h, size)


def _free(x: float, y: float, half_width: float, half_height: float, taken: list[Box]) -> bool:
    return all(
        abs(x - tx) > half_width + tw + GAP or abs(y - ty) > half_height + th + GAP
        for tx, ty, tw, th in taken
    )


def _shape(
    rng: random.Random,
    width: float,
    height: float,
    taken: list[Box],
    size: str,
) -> Shape | None:
    """Place one more shape; None if 60 tries found no space."""
    radius = SIZES[size] * rng.uniform(0.95, 1.05)
    for _ in range(60):
        x = rng.uniform(radius + MARGIN, width - radius - MARGIN)
        y = rng.uniform(radius + MARGIN, height - radius - MARGIN)
        if _free(x, y, radius, radius, taken):
            taken.append((x, y, radius, radius))
            kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
            return Shape(kind, colour, size, x, y, radius, rng.uniform(-15, 15))
    return None


# Drawing.


def render(scene: Scene) -> Image.Image:
    """Render a scene as an RGB image with a longer side of 240 to 480 px."""
    rng = random.Random(f"pixels {scene.seed}")
    side = rng.randint(*LONG_SIDES)
    width, height = round(scene.width * side), round(scene.height * side)
    image, light = _background(rng, width, height)
    for shape in scene.shapes:
        _draw_shape(image, shape, side, rng)
    if scene.text is not None:
        ink = rng.randint(0, 40) if light > 135 else rng.randint(225, 255)
        at = (scene.text.x * side, scene.text.y * side)
        font = _font(max(8, round(scene.text.font_size * side)))
        ImageDraw.Draw(image).text(at, scene.text.content, (ink,) * 3, font, anchor="mm")
    x, y = rng.randrange(512 - width), rng.randrange(512 - height)
    noise = rng.uniform(0, 8) * _noise()[y : y + height, x : x + width, None]
    pixels = np.asarray(image) + noise
    return Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8))


@cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((512, 512), np.float32)


def _background(rng: random.Random, width: int, height: int) -> tuple[Image.Image, float]:
    """A plain, shaded or striped background of low saturation, and its lightness, 95 to 185."""
    light = rng.uniform(95, 185)
    colour = np.array([light + rng.uniform(-22, 22) for _ in range(3)], np.float32)
    angle, style = rng.uniform(0, 2 * math.pi), rng.choice(("plain", "shaded", "striped"))
    x, y = (np.arange(n, dtype=np.float32) / max(width, height) for n in (width, height))
    along = x * np.float32(math.cos(angle)) + y[:, None] * np.float32(math.sin(angle))
    if style == "plain":
        along *= 0
    elif style == "striped":
        along = np.sin(along * np.float32(rng.uniform(20, 60))) / 4
    return Image.fromarray((colour + 24 * along[..., None]).astype(np.uint8)), light


def _draw_shape(image: Image.Image, shape: Shape, side: int, rng: random.Random) -> None:
    """Draw an antialiased shape: paste its colour through an averaged, oversampled mask."""
    left, top = ((c - shape.radius) * side for c in (shape.x, shape.y))
    x0, y0 = math.floor(left), math.floor(top)
    size = math.ceil(2 * shape.radius * side) + 2
    mask = Image.new("L", (size * OVERSAMPLING,) * 2)
    points = _outline(shape.kind, math.radians(shape.angle))
    offset = np.array([left - x0, top - y0]) + shape.radius * side
    scaled = (points * shape.radius * side + offset) * OVERSAMPLING
    ImageDraw.Draw(mask).polygon([tuple(p) for p in scaled.tolist()], fill=255)
    colour = tuple(c + rng.randint(-8, 7) for c in COLOURS[shape.colour])
    image.paste(colour, (x0, y0), mask.reduce(OVERSAMPLING))


def _outline(kind: str, angle: float) -> np.ndarray:
    """Outline (n, 2) of a shape within the unit circle, rotated by `angle` radians."""
    if kind == "circle":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return np.stack([np.cos(t), np.sin(t)], 1)
    if kind == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        points = np.stack([x, y - 2.5], 1) / 17
    elif kind == "cross":
        a, b = 0.32, 0.93
        quarter = np.array([(a, b), (a, a), (b, a)])
        turn = np.array([[0, 1], [-1, 0]])
        points = np.concatenate([quarter @ np.linalg.matrix_power(turn, -k % 4) for k in range(4)])
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[kind]
        t = (
            np.pi / corners * (kind == "square")
            - np.pi / 2
            + np.arange(corners) * 2 * np.pi / corners
        )
        far = np.where(np.arange(corners) % 2, 0.42, 1.0) if kind == "star" else np.ones(corners)
        points = np.stack([np.cos(t), np.sin(t)], 1) * far[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])
