"""Those who do the work: one module each, imported in a process of its own.

`prepare(case, checkpoint)` loads what the case needs and returns a function that, given the number
of a repetition, gets all ready and returns the work to be timed, which ends when its result is
there. Checkpoints are as `bench/checkpoints.py` writes them.
"""

from collections.abc import Callable

Work = Callable[[], object]
Repeat = Callable[[int], Work]
