"""Forty drawn scenes with one or two shapes each, for tests of the photo library."""

from world import HELD_OUT, scene

SCENES = [scene(HELD_OUT + 7_000_000 + i, shapes=(1, 2), central=True) for i in range(40)]
NAMES = [{shape.name for shape in each.shapes} for each in SCENES]
