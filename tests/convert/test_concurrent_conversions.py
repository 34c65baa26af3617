"""Concurrent conversions to one target: one writes all of it, the others report an error."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread

import pytest
import synthetic

from convert.write import PARTIAL, new_directory
from mlx_mobileclip.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name.endswith(PARTIAL)]


def write_at_once(target: Path, writers: int) -> dict[int, str]:
    """Let threads write their numbers to one target; returns the outcome of each."""
    outcomes, barrier = dict[int, str](), Barrier(writers)

    def work(i: int) -> None:
        barrier.wait()
        try:
            with new_directory(target) as partial:
                for name in "abc":
                    (partial / name).write_text(str(i))
                    time.sleep(0.001)
            outcomes[i] = "done"
        except CheckpointError as error:
            outcomes[i] = str(error)

    threads = [Thread(target=work, args=(i,)) for i in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_one_of_many_threads_writes_the_target(tmp_path: Path) -> None:
    for attempt in range(20):
        target = tmp_path / f"out{attempt}"
        outcomes = write_at_once(target, 8)
        (winner,) = [i for i, outcome in outcomes.items() if outcome == "done"]
        assert {path.read_text() for path in target.iterdir()} == {str(winner)}
        assert all("already exists" in o for i, o in outcomes.items() if i != winner)
    assert not leftovers(tmp_path)


def convert_pair(sources: list[Path], target: Path) -> None:
    """Run conversions of two models to one target at once."""
    command = [sys.executable, "-m", "convert", "--mlx-path", str(target), "--quiet", "--model"]
    runs = [
        subprocess.Popen(
            [*command, str(source)], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        for source in sources
    ]
    errors = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1], errors
    winner = [run.returncode for run in runs].index(0)
    assert errors[winner] == "" and "already exists" in errors[1 - winner]
    config = json.loads((target / "config.json").read_text())
    assert config["source"]["model"] == str(sources[winner])
    expected = {"NOTICE", "README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in target.iterdir()} == expected
    assert str(sources[winner]) in (target / "NOTICE").read_text()
    assert not leftovers(target.parent)


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [
        synthetic.write_layout(tmp_path / layout, layout) for layout in ("llava_qwen2", "fast_vlm")
    ]


def test_two_conversions_at_once(sources: list[Path], tmp_path: Path) -> None:
    for i in range(2):
        convert_pair(sources, tmp_path / f"out{i}")


@pytest.mark.stress
def test_a_hundred_pairs_of_conversions(sources: list[Path], tmp_path: Path) -> None:
    for i in range(100):
        convert_pair(sources, tmp_path / f"out{i}")


def test_only_abandoned_directories_are_removed(tmp_path: Path) -> None:
    """Not those of a running conversion, nor others of a similar name."""
    target = tmp_path / "[out]"
    mine = tmp_path / f".[out].notes{PARTIAL}"
    mine.mkdir()
    refused = (pytest.raises(CheckpointError), pytest.raises(CheckpointError))
    with refused[0], new_directory(target) as first, refused[1], new_directory(target):
        assert first.is_dir()
        target.mkdir()
        (target / "b").touch()
    abandoned = tmp_path / f".[out].{'0' * 16}{PARTIAL}"
    (abandoned / "deep").mkdir(parents=True)
    with new_directory(tmp_path / "[out]2"):
        assert abandoned.is_dir()  # of another target
    (target / "b").unlink()
    with new_directory(target) as second:
        assert not abandoned.exists()
        (second / "c").touch()
    assert [path.name for path in target.iterdir()] == ["c"] and mine.is_dir()
