"""Training scenes, drawn once into a file and then read in random order."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from reference import torch
from world import HELD_OUT, Scene, render

CHUNK = 250  # scenes a process draws at a time


class Scenes:
    """Scenes of seeds 0 to `count`, and their prepared images in a file of bytes."""

    def __init__(
        self,
        path: Path,
        count: int,
        make: Callable[[int], Scene],
        prepare: Callable[[Image.Image], Image.Image],
        side: int,
    ):
        """Draw them, with every core, unless the file is already there.

        Args:
            path: The file, count * side * side * 3 bytes.
            count: Number of scenes.
            make: From seed to scene.
            prepare: What the model's preprocessing does to an image.
            side: Of a prepared image, px.
        """
        assert count <= HELD_OUT
        self.scenes = [make(seed) for seed in range(count)]
        shape = (count, side, side, 3)
        if not path.exists():
            partial_path = path.with_suffix(".partial")
            pixels = np.memmap(partial_path, np.uint8, "w+", shape=shape)
            chunks = [self.scenes[i : i + CHUNK] for i in range(0, count, CHUNK)]
            with ProcessPoolExecutor(os.cpu_count()) as pool:
                for i, drawn in enumerate(pool.map(partial(_draw, prepare=prepare), chunks)):
                    pixels[i * CHUNK : i * CHUNK + len(drawn)] = drawn
                    print(f"drew {i * CHUNK + len(drawn)} of {count} scenes", end="\r", flush=True)
            print()
            pixels.flush()
            partial_path.rename(path)
        self.pixels = np.memmap(path, np.uint8, "r", shape=shape)

    def batches(self, size: int, start: int) -> Iterator[tuple[torch.Tensor, list[Scene]]]:
        """Batches without end, from the one numbered `start` on; the same ones in every run.

        Yields:
            Pixels (B, 3, S, S) in [0, 1] and their scenes.
        """
        for chosen, scenes in self.choices(size, start):
            yield tensor(self.pixels[chosen]), scenes

    def choices(
        self, size: int, start: int, count: int | None = None
    ) -> Iterator[tuple[np.ndarray, list[Scene]]]:
        """The seeds of each of those batches, all below `count`, and their scenes."""
        count = count or len(self.scenes)
        per_epoch = count // size
        epoch, skip = divmod(start, per_epoch)
        while True:
            order = np.random.default_rng(epoch).permutation(count)
            for i in range(skip, per_epoch):
                chosen = np.sort(order[i * size : (i + 1) * size])
                yield chosen, [self.scenes[c] for c in chosen]
            epoch, skip = epoch + 1, 0


def _draw(scenes: list[Scene], prepare: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(prepare(render(scene))) for scene in scenes])


def tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) as (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def looked_at(
    path: Path, scenes: Scenes, count: int, see: Callable[[torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """What `see` makes of the first scenes' images, float16, kept in a file for the next run."""
    if not path.exists():
        parts = []
        for start in range(0, count, 64):
            pixels = tensor(scenes.pixels[start : min(start + 64, count)])
            parts.append(see(pixels).numpy().astype(np.float16))
            print(f"looked at {start + len(pixels)} of {count} scenes", end="\r", flush=True)
        print()
        unfinished = path.with_suffix(".partial.npy")
        np.save(unfinished, np.concatenate(parts))
        unfinished.rename(path)
    return np.load(path)
