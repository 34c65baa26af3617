"""Training data: scenes rendered in a background process, or cached features of a tower."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from reference import torch
from world import HELD_OUT, Scene, render

AHEAD = 4  # batches to render in advance
FEATURE_BATCH = 64

MakeScene = Callable[[int], Scene]
Prepare = Callable[[Image.Image], Image.Image]


def draw_batches(
    make: MakeScene, prepare: Prepare, size: int, start: int
) -> Iterator[tuple[torch.Tensor, list[Scene]]]:
    """Render batches without end in a background process; no scene is repeated.

    Args:
        make: Returns the scene of a seed.
        prepare: The model's image preprocessing, to a square of S px.
        size: Batch size, B.
        start: Index of the first batch; the seeds of batch i begin at i * size.

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
    """Yield batches of shuffled indices below `count` without end, from batch `start` on.

    The order is the same in every run; an epoch has each index at most once.
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
    """Convert uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def cached_features(
    path: Path,
    count: int,
    make: MakeScene,
    prepare: Prepare,
    encode: Callable[[torch.Tensor], torch.Tensor],
) -> np.ndarray:
    """Outputs of `encode` for the first `count` scenes, float16, cached in a file between runs."""
    if not path.exists():
        parts: list[np.ndarray] = []
        batches = draw_batches(make, prepare, FEATURE_BATCH, 0)
        while (done := len(parts) * FEATURE_BATCH) < count:
            print(f"features of {done} of {count} scenes", end="\r", flush=True)
            parts.append(encode(next(batches)[0]).numpy().astype(np.float16))
        batches.close()
        print()
        unfinished = path.with_suffix(".partial.npy")
        np.save(unfinished, np.concatenate(parts)[:count])
        unfinished.rename(path)
    return np.load(path)
