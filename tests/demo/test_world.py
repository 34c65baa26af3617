"""Scenes are drawn as described, questions have one right answer, captions are true."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from captions import LABELS, Caption, caption
from harder_questions import SIDES, compare
from questions import description, place
from tasks import TASKS, ask
from variations import COUNT, detailed, variations
from world import COLOURS, GAP, HELD_OUT, KINDS, SIZES, Scene, render, scene

SEEDS = range(HELD_OUT, HELD_OUT + 150)


def things(shown: Scene) -> list[tuple[float, float, float, float]]:
    """Centre, half width and half height of every shape and text."""
    boxes = [(s.x, s.y, s.radius, s.radius) for s in shown.shapes]
    if shown.text is not None:
        boxes.append((shown.text.x, shown.text.y, shown.text.width / 2, shown.text.height / 2))
    return boxes


def test_scene_depends_on_its_seed_only() -> None:
    for seed in SEEDS[:5]:
        assert scene(seed) == scene(seed)
        assert render(scene(seed)).tobytes() == render(scene(seed)).tobytes()
    assert len({render(scene(seed)).tobytes() for seed in SEEDS[:20]}) == 20


@pytest.mark.parametrize("central", [False, True])
def test_shapes_and_texts_do_not_overlap(central: bool) -> None:
    for seed in SEEDS:
        shown = scene(seed, central=central)
        boxes = things(shown)
        short = min(shown.width, shown.height) if central else 1.0
        for i, (x, y, w, h) in enumerate(boxes):
            for centre, half, extent in ((x, w, shown.width), (y, h, shown.height)):
                inside = min(extent, short) / 2
                assert abs(centre - extent / 2) + half <= inside
            for other_x, other_y, other_w, other_h in boxes[:i]:
                across, down = abs(x - other_x) - w - other_w, abs(y - other_y) - h - other_h
                assert max(across, down) > GAP


def test_scenes_are_varied() -> None:
    scenes = [scene(seed) for seed in SEEDS]
    shapes = [shape for shown in scenes for shape in shown.shapes]
    assert {len(shown.shapes) for shown in scenes} == {1, 2, 3, 4, 5}
    assert {s.kind for s in shapes} == set(KINDS) and len(KINDS) >= 6
    assert {s.colour for s in shapes} == set(COLOURS) and len(COLOURS) == 8
    assert {s.size for s in shapes} == set(SIZES) and len(SIZES) == 3
    texts = [shown.text.content for shown in scenes if shown.text]
    assert any(text.isdigit() for text in texts) and any(text.isalpha() for text in texts)
    ratios = [shown.width / shown.height for shown in scenes]
    assert min(ratios) < 0.7 and max(ratios) > 1.4


def test_shapes_are_drawn_in_place_and_colour() -> None:
    for seed in SEEDS[:40]:
        shown = scene(seed)
        image = np.asarray(render(shown)).astype(int)
        side = max(image.shape[:2])
        for shape in shown.shapes:
            near = image[int(shape.y * side) - 1 :, int(shape.x * side) - 1 :][:3, :3]
            assert np.abs(near.mean((0, 1)) - COLOURS[shape.colour]).max() < 24, (seed, shape)


@pytest.mark.parametrize("task", TASKS)
def test_questions_vary_and_some_are_about_absent_things(task: str) -> None:
    rng = random.Random(0)
    asked = [q for q in (ask(scene(seed), rng, task) for seed in SEEDS) if q is not None]
    assert len(asked) > len(SEEDS) / 2
    assert all(question.task == task for question in asked)
    assert len({question.text for question in asked}) > (1 if task in ("read", "describe") else 9)
    if task in ("colour", "shape", "position"):
        missing = [q for q in asked if q.answer.startswith("There is no ")]
        assert 0.04 < len(missing) / len(asked) < 0.3
    if task == "presence":
        answers = Counter(question.answer.partition(",")[0] for question in asked)
        assert min(answers["Yes"], answers["No"]) > len(asked) / 4


def test_relations_agree_with_the_scene() -> None:
    rng = random.Random(3)
    checked = 0
    for seed in SEEDS:
        shown = scene(seed)
        question = ask(shown, rng, "relation")
        if question is None or question.answer.startswith("There is no "):
            continue
        thing, *found = question.things
        side = next(side for side in SIDES if f" {side} the " in question.text)
        on_it = [s for s in shown.shapes if s is not thing and SIDES[side](s, thing) > 0]
        assert sorted(s.name for s in on_it) == sorted(s.name for s in found)
        assert all(f"{s.colour} {s.kind}" in question.answer.lower() for s in found)
        assert question.answer.startswith("Nothing is") == (not found)
        checked += 1
    assert checked > len(SEEDS) / 2


def test_json_answers_agree_with_the_scene() -> None:
    rng = random.Random(4)
    keys = set()
    for seed in SEEDS:
        question = ask(shown := scene(seed), rng, "structured")
        if question is None:
            continue
        (key, *rest), value = (said := json.loads(question.answer)), next(iter(said.values()))
        keys.add(key)
        if key == "text" or rest:
            assert said["text"] == (shown.text.content if shown.text else None)
        if key == "shapes":
            names = [f"{each['colour']} {each['shape']}" for each in value]
            assert names == [s.name for s in sorted(shown.shapes, key=lambda s: s.x)]
        if key == "colour" and value is None:
            assert all(s.kind not in question.text for s in shown.shapes)
    assert keys == {"count", "colour", "shape", "present", "text", "shapes"}


def test_comparisons_agree_with_both_scenes() -> None:
    rng = random.Random(5)
    begins: Counter[str] = Counter()
    for seed in SEEDS:
        first, second = scene(seed), scene(seed + 10_000)
        question = compare(first, second, rng)
        assert question is None or question.task == "compare"
        if question is None:
            continue
        begins[" ".join(question.answer.split()[:2])] += 1
        if question.text == "Which image has more shapes?":
            a, b = len(first.shapes), len(second.shapes)
            ordinal = "first" if a > b else "second"
            assert (f"The {ordinal} image" in question.answer) == (a != b)
    assert {"Only the", "Both images", "Neither image", "No, the"} <= begins.keys()


def test_variations_differ_in_one_respect() -> None:
    for seed in SEEDS[:40]:
        first, resized, moved, added = variations(seed)
        assert first.shapes[0].size != resized.shapes[0].size
        assert place(first, first.shapes[0].x, first.shapes[0].y) != place(
            moved, moved.shapes[0].x, moved.shapes[0].y
        )
        assert len(added.shapes) == len(first.shapes) + 1
        said = {detailed(shown) for shown in (first, resized, moved, added)}
        assert len(said) == COUNT and None not in said
        true = [Caption("", (), detailed(first)).is_true_of(s) for s in variations(seed)]
        assert true == [True, False, False, False]


def test_colours_and_counts_agree_with_the_scene() -> None:
    rng = random.Random(1)
    for seed in SEEDS:
        shown = scene(seed)
        question = ask(shown, rng, "colour")
        if question and not question.answer.startswith("There is no"):
            _, kind, _, colour = question.answer.rstrip(".").split()
            assert [s.colour for s in shown.shapes if s.kind == kind] == [colour]
        question = ask(shown, rng, "count")
        if question and "shapes are" in question.text and question.text.split()[2] == "shapes":
            assert f" {len(shown.shapes)} " in question.answer


def test_place_near_a_border_has_no_name() -> None:
    wide = Scene(0, 1.0, 0.6, (), None)
    assert place(wide, 0.1, 0.1) == "at the top left"
    assert place(wide, 0.5, 0.3) == "in the centre"
    assert place(wide, 0.34, 0.3) is None


def test_captions_are_true_of_their_scene() -> None:
    rng = random.Random(2)
    assert len(LABELS) == 48
    for seed in SEEDS:
        shown = scene(seed)
        said = caption(shown, rng)
        assert said.is_true_of(shown)
        assert all(name in said.text.lower() for name in said.names)
        assert description(shown).count("small") == sum(s.size == "small" for s in shown.shapes)
