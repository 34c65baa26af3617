"""Search accuracy on drawn scenes, for queries with and without matches.

PYTHONPATH=. python tests/demo/measure_search.py [MODEL] [--photos N] [--json]

The library has scenes and variations without a dozen of the 48 objects, so queries for these match
nothing. Each query has a ground-truth predicate. No threshold is tuned here.
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
QUERIES = 200  # with matches, and as many without
# Objects that no drawn scene can show.
OUT_OF_DOMAIN = (
    "a dog on a beach", "a red car in the snow", "two people at a table", "a bridge over a river",
    "a birthday cake", "a cat asleep on a sofa", "a plate of food", "a train at a station",
    "mountains at sunset", "a child with a kite", "a phone on a desk", "a street at night",
    "a flower in a vase", "a boat on a lake", "a group photo", "a screenshot of an error",
    "a bicycle against a wall", "a map of a city", "a horse in a field", "a football match",
)  # fmt: skip


@dataclass(frozen=True)
class LabelledQuery:
    """A query, its kind, and its ground-truth predicate."""

    kind: str
    text: str
    matches: Callable[[Scene], bool]


def shows_all(*names: str) -> Callable[[Scene], bool]:
    return lambda scene: set(names) <= {shape.name for shape in scene.shapes}


def draw_scenes(count: int, absent: set[str]) -> list[Scene]:
    """Scenes, every third with its four variations, without absent objects."""
    scenes: list[Scene] = []
    seed = SEED
    while len(scenes) < count:
        seed += 1
        new = variations(seed) if seed % 3 == 0 else [scene(seed, central=True)]
        scenes += [s for s in new if not absent & {shape.name for shape in s.shapes}]
    return scenes[:count]


def make_queries(scenes: list[Scene], absent: set[str], rng: random.Random) -> list[LabelledQuery]:
    """Create queries of all kinds, more than needed."""
    by_text: dict[str, LabelledQuery] = {
        text: LabelledQuery("elsewhere", text, lambda _: False) for text in OUT_OF_DOMAIN
    }

    def add(kind: str, text: str, matches: Callable[[Scene], bool]) -> None:
        by_text[text] = LabelledQuery(kind, text, matches)

    for name in LABELS:
        for opening in dict.fromkeys(OPENINGS):
            add("thing", opening + article(name), shows_all(name))
    missing = sorted(absent)
    for _ in range(QUERIES):
        one, other = rng.sample(LABELS, 2)
        add("two things", f"{article(one)} and {article(other)}", shows_all(one, other))
        one = rng.choice(missing)
        other = rng.choice([name for name in LABELS if name != one])
        add("two things", f"{article(one)} and {article(other)}", shows_all(one, other))
    others = [s for n in range(QUERIES) for s in variations(SEED - 1000 - n)]
    for each in [*rng.sample(scenes, min(len(scenes), QUERIES)), *rng.sample(others, QUERIES)]:
        if caption := detailed(each):
            add("details", caption, lambda s, caption=caption: detailed(s) == caption)
    return list(by_text.values())


def measure(model_name: str, photos: int) -> dict[str, Any]:
    """Accuracy by kind of query."""
    rng = random.Random(photos)
    absent = set(rng.sample(LABELS, ABSENT_THINGS))
    scenes = draw_scenes(photos, absent)
    model, processor = load(model_name)
    rows = []
    for i in range(0, photos, 32):
        pixels = processor.images([render(each) for each in scenes[i : i + 32]])
        rows += list(np.asarray(model.encode_image(pixels, normalize=True), np.float16))
        mx.clear_cache()

    def embed(texts: Any) -> Any:
        parts = [processor.texts(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        return np.concatenate([np.asarray(model.encode_text(p, normalize=True)) for p in parts])

    queries = make_queries(scenes, absent, rng)
    rng.shuffle(queries)
    without_match = [q for q in queries if not any(map(q.matches, scenes))][:QUERIES]
    with_match = [q for q in queries if any(map(q.matches, scenes))][:QUERIES]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "photos.db", create=True)
        root, _ = store.root_for(b"/drawn")
        store.put(root, [Photo(str(i).encode()) for i in range(photos)], rows)
        vectors = Vectors(store.connection, model.config.embed_dim)
        report: dict[str, Any] = {"model": model_name, "photos": photos}
        for label, group in (("nothing", without_match), ("something", with_match)):
            for kind in ("all", *sorted({q.kind for q in group})):
                selected = [q for q in group if kind in ("all", q.kind)]
                found = [search(store, vectors, embed, Query([q.text]), k=photos) for q in selected]
                hits = [
                    [q.matches(scenes[int(Path(path).name)]) for path in results.paths]
                    for q, results in zip(selected, found, strict=True)
                ]
                relevant = sum(sum(map(q.matches, scenes)) for q in selected)
                shown, correct = sum(map(len, hits)), sum(map(sum, hits))
                entry = {"queries": len(selected), "answered": sum(map(bool, hits)) / len(selected)}
                if label == "something":
                    answered = [sum(t) / len(t) for t in hits if t]
                    entry["precision"] = correct / shown if shown else None
                    entry["precision_per_query"] = float(np.mean(answered)) if answered else None
                    entry["recall"] = correct / relevant
                report[f"{label}: {kind}"] = entry
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
