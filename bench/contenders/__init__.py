"""Implementations to compare: one module each, imported in its own process.

`prepare(case, checkpoint)` loads the model and returns a function that, given the index of a
repetition, prepares its inputs and returns the work to time. The work ends when its result is
computed. Checkpoints are written by `bench/checkpoints.py`.
"""

from collections.abc import Callable

Work = Callable[[], object]
Repeat = Callable[[int], Work]
