"""How often a search is right about drawn scenes: that nothing matches, and what it shows.

PYTHONPATH=. python tests/demo/measure_search.py [MODEL] [--photos N] [--json]

A library is drawn of scenes and of their variations without a dozen of the 48 things. Queries about
these match nothing. They and all others are Python objects with a truth; nothing here chooses a
threshold.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from captions import LABELS, OPENINGS
from questions import article
from variations import detailed, variations
from world import HELD_OUT, Scene, render, scene

from mlx_mobileclip import load
from mlx_mobileclip.library.queries import Query
from mlx_mobileclip.library.search import search
from mlx_mobileclip.library.store import Photo, Store
from mlx_mobileclip.library.vectors import Vectors

SEED = HELD_OUT + 40_000_000
ABSENT_THINGS = 12
EACH = 200  # queries that nothing matches, and queries that something matches
# Things that no scene of this world can show.
ELSEWHERE = (
    "a dog on a beach", "a red car in the snow", "two people at a table", "a bridge over a river",
    "a birthday cake", "a cat asleep on a sofa", "a plate of food", "a train at a station",
    "mountains at sunset", "a child with a kite", "a phone on a desk", "a street at night",
    "a flower in a vase", "a boat on a lake", "a group photo", "a screenshot of an error",
    "a bicycle against a wall", "a map of a city", "a horse in a field", "a football match",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A query, its kind, and whether a scene shows it."""

    kind: str
    text: str
    is_shown: Callable[[Scene], bool]


def shows(*names: str) -> Callable[[Scene], bool]:
    return lambda scene: set(names) <= {shape.name for shape in scene.shapes}


def draw(count: int, absent: set[str]) -> list[Scene]:
    """Scenes, and for every third of them four variations, none of which has an absent thing."""
    scenes: list[Scene] = []
    seed = SEED
    while len(scenes) < count:
        seed += 1
        new = variations(seed) if seed % 3 == 0 else [scene(seed, central=True)]
        scenes += [s for s in new if not absent & {shape.name for shape in s.shapes}]
    return scenes[:count]


def ask(scenes: list[Scene], absent: set[str], rng: random.Random) -> list[Asked]:
    """Queries of all kinds, more than needed."""
    asked: dict[str, Asked] = {
        text: Asked("elsewhere", text, lambda _: False) for text in ELSEWHERE
    }

    def add(kind: str, text: str, is_shown: Callable[[Scene], bool]) -> None:
        asked[text] = Asked(kind, text, is_shown)

    for name in LABELS:
        for opening in dict.fromkeys(OPENINGS):
            add("thing", opening + article(name), shows(name))
    missing = sorted(absent)
    for _ in range(EACH):
        one, other = rng.sample(LABELS, 2)
        add("two things", f"{article(one)} and {article(other)}", shows(one, other))
        one = rng.choice(missing)
        other = rng.choice([name for name in LABELS if name != one])
        add("two things", f"{article(one)} and {article(other)}", shows(one, other))
    others = [s for n in range(EACH) for s in variations(SEED - 1000 - n)]
    for each in [*rng.sample(scenes, min(len(scenes), EACH)), *rng.sample(others, EACH)]:
        if said := detailed(each):
            add("details", said, lambda s, said=said: detailed(s) == said)
    return list(asked.values())


def measure(model_name: str, photos: int) -> dict[str, Any]:
    """Shares of right answers by kind of query."""
    rng = random.Random(photos)
    absent = set(rng.sample(LABELS, ABSENT_THINGS))
    scenes = draw(photos, absent)
    model, processor = load(model_name)
    rows = []
    for i in range(0, photos, 32):
        pixels = processor.images([render(each) for each in scenes[i : i + 32]])
        rows += list(np.asarray(model.encode_image(pixels, normalize=True), np.float16))
        mx.clear_cache()

    def embed(texts: Any) -> Any:
        parts = [processor.texts(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        return np.concatenate([np.asarray(model.encode_text(p, normalize=True)) for p in parts])

    queries = ask(scenes, absent, rng)
    rng.shuffle(queries)
    nothing = [q for q in queries if not any(map(q.is_shown, scenes))][:EACH]
    something = [q for q in queries if any(map(q.is_shown, scenes))][:EACH]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "photos.db", create=True)
        root, _ = store.root_for(b"/drawn")
        store.put(root, [Photo(str(i).encode()) for i in range(photos)], rows)
        vectors = Vectors(store.connection, model.config.embed_dim)
        report: dict[str, Any] = {"model": model_name, "photos": photos}
        for what, group in (("nothing", nothing), ("something", something)):
            for kind in ("all", *sorted({q.kind for q in group})):
                asked = [q for q in group if kind in ("all", q.kind)]
                found = [search(store, vectors, embed, Query([q.text]), k=photos) for q in asked]
                true = [
                    [q.is_shown(scenes[int(Path(path).name)]) for path in results.paths]
                    for q, results in zip(asked, found, strict=True)
                ]
                there = sum(sum(map(q.is_shown, scenes)) for q in asked)
                shown, right = sum(map(len, true)), sum(map(sum, true))
                entry = {"queries": len(asked), "answered": sum(map(bool, true)) / len(asked)}
                if what == "something":
                    answered = [sum(t) / len(t) for t in true if t]
                    entry["precision"] = right / shown if shown else None
                    entry["precision_per_query"] = float(np.mean(answered)) if answered else None
                    entry["recall"] = right / there
                report[f"{what}: {kind}"] = entry
        store.close()
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.model, args.photos)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:24} {value}")
