"""Mutate files at random from a seed: values and structure of their JSON, or their bytes."""

import copy
import json
import random
from typing import Any

LONG = "@long@"  # stands for an integer of more digits than Python parses
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 1 << 31, 1 << 63, -(1 << 70), LONG),
    *(0.0, 0.25, -0.5, 1e-40, 1e308, float("nan"), float("inf")),
    *("", "a", "a b", "\0", "\ud800", "\x1b[2J", "x" * 5000, "&#" + "9" * 5000, "mlp2x_gelu"),
    *([], [1], ["a"], [[]], [None], [0.25] * 3, [1] * 100, {}, {"a": 1}, {"": []}, [{"a": {}}]),
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the file with one to three changes, most often in its JSON."""
    if rng.random() < 0.2:
        return _mutated_bytes(data, rng)
    try:
        value = json.loads(data)
    except ValueError:
        return _mutated_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _mutate(value, rng)
    return json.dumps(value).replace(f'"{LONG}"', "9" * 5000).encode()


def _mutate(value: Any, rng: random.Random) -> Any:
    """Change one value, at any depth."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return _replacement(value, rng)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = rng.random()
    if isinstance(value[key], (dict, list)) and action < 0.8:
        value[key] = _mutate(value[key], rng)
    elif action < 0.85:
        value[key] = _replacement(value[key], rng)
    elif action < 0.93:
        del value[key]
    elif isinstance(value, dict):
        value[rng.choice(("new", "", "\ud800", str(key) + "_"))] = _any(rng)
    else:
        value.append(copy.deepcopy(rng.choice((*VALUES, value[0]))))
    return value


def _replacement(value: Any, rng: random.Random) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, value * 2, -value, value / 3, str(value), [value]))
    if isinstance(value, str) and rng.random() < 0.3:
        return rng.choice((value.upper(), value[1:], value + "x", [value], {value: value}))
    return _any(rng)


def _any(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def _mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.2:
            del result[rng.randrange(len(result) + 1) :]
        start = rng.randrange(len(result) + 1)
        result[start : start + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    return bytes(result)
