"""Training scenes: drawn beside training, or looked at once by a trained tower."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from reference import torch
from world import HELD_OUT, Scene, render

AHEAD = 4  # batches drawn before they are needed
LOOKED_AT = 64  # scenes a tower looks at together

MakeScene = Callable[[int], Scene]
Prepare = Callable[[Image.Image], Image.Image]


def draw_batches(
    make: MakeScene, prepare: Prepare, size: int, start: int
) -> Iterator[tuple[torch.Tensor, list[Scene]]]:
    """Batches without end, drawn by a process of its own; no scene comes twice.

    Args:
        make: From seed to scene.
        prepare: What the model's preprocessing does to an image: a square of S px.
        size: Scenes of a batch, B.
        start: Number of the first batch; batch i has the seeds from i * size on.

    Yields:
        Pixels (B, 3, S, S) in [0, 1] and their scenes.
    """
    with ProcessPoolExecutor(1) as pool:
        drawn: deque[tuple[list[Scene], Future[np.ndarray]]] = deque()
        number = start
        while True:
            while len(drawn) < AHEAD:
                seeds = range(number * size, (number + 1) * size)
                assert seeds.stop <= HELD_OUT
                scenes = [make(seed) for seed in seeds]
                drawn.append((scenes, pool.submit(_draw, scenes, prepare)))
                number += 1
            scenes, images = drawn.popleft()
            yield tensor(images.result()), scenes


def choose(size: int, start: int, count: int) -> Iterator[np.ndarray]:
    """Batches of numbers below `count` without end, from the one numbered `start` on.

    They are the same ones in every run; each number comes once an epoch.
    """
    per_epoch = count // size
    epoch, skip = divmod(start, per_epoch)
    while True:
        order = np.random.default_rng(epoch).permutation(count)
        for i in range(skip, per_epoch):
            yield np.sort(order[i * size : (i + 1) * size])
        epoch, skip = epoch + 1, 0


def _draw(scenes: list[Scene], prepare: Prepare) -> np.ndarray:
    return np.stack([np.asarray(prepare(render(scene))) for scene in scenes])


def tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) as (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def looked_at(
    path: Path,
    count: int,
    make: MakeScene,
    prepare: Prepare,
    see: Callable[[torch.Tensor], torch.Tensor],
) -> np.ndarray:
    """What `see` makes of scenes 0 to `count`, float16, kept in a file for the next run."""
    if not path.exists():
        parts: list[np.ndarray] = []
        batches = draw_batches(make, prepare, LOOKED_AT, 0)
        while (done := len(parts) * LOOKED_AT) < count:
            print(f"looked at {done} of {count} scenes", end="\r", flush=True)
            parts.append(see(next(batches)[0]).numpy().astype(np.float16))
        batches.close()
        print()
        unfinished = path.with_suffix(".partial.npy")
        np.save(unfinished, np.concatenate(parts)[:count])
        unfinished.rename(path)
    return np.load(path)
