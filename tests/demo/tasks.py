"""The question types (tasks) of the FastVLM demo model, by name."""

import random
from collections.abc import Callable

from harder_questions import relation, structured
from questions import Question, colour, count, describe, position, presence, read, shape, size
from world import Scene

ABOUT_ONE_IMAGE = (
    count, colour, shape, position, relation, size, presence, read, describe, structured,
)  # fmt: skip
TASKS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    task.__name__: task for task in ABOUT_ONE_IMAGE
}


def ask(scene: Scene, rng: random.Random, task: str) -> Question | None:
    """Ask a question of a task; None if the scene has none with a single answer."""
    for _ in range(4):
        question = TASKS[task](scene, rng)
        if question is not None:
            return question
    return None
