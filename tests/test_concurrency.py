"""A model answers from any thread, cold or warm; a process ends cleanly; a forked child is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mobileclip import concurrency

ROOT = Path(__file__).parents[1]
COLD = ROOT / "tests" / "support" / "cold_threads.py"
KINDS = ("fastvlm", "images", "texts", "both")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def ask_cold(kind: str) -> None:
    done = run(COLD, kind, 8)
    assert done.returncode == 0, (kind, done.returncode, done.stderr[-2000:])
    found, alone = json.loads(done.stdout)
    assert found == alone
    assert len({json.dumps(answer) for answer in found}) > 1  # not all alike


@pytest.mark.parametrize("kind", KINDS)
def test_cold_threads_are_all_answered_and_the_process_ends_well(kind: str) -> None:
    for _ in range(2):
        ask_cold(kind)


@pytest.mark.stress
@pytest.mark.parametrize("kind", KINDS)
def test_cold_threads_a_hundred_times(kind: str) -> None:
    for _ in range(25):
        ask_cold(kind)


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
{before}
child = os.fork()
if not child:
    try:
        {inside}
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        os._exit(3)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
LOAD = "import mlx_{0}; model, processor = mlx_{0}.load('demo')"
SCENE = ROOT / "examples" / "scene.png"


@pytest.mark.parametrize(
    ("package", "inside"),
    [
        ("fastvlm", "mlx_fastvlm.generate(model, processor, 'What is this?')"),
        ("fastvlm", "model.encode_image(None)"),
        ("fastvlm", "model(None)"),
        ("fastvlm", "mlx_fastvlm.load('demo')"),
        ("mobileclip", "model.encode_image(None)"),
        ("mobileclip", "model.encode_text(None)"),
        ("mobileclip", "mlx_mobileclip.load('demo')"),
        ("mobileclip", f"mlx_mobileclip.classify(model, processor, [{str(SCENE)!r}], ['a', 'b'])"),
    ],
)
def test_a_child_forked_after_loading_is_told_in_one_line(package: str, inside: str) -> None:
    done = run("-c", FORK.format(before=LOAD.format(package), inside=inside))
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("ModelError this process was forked from one that had loaded a")
    assert len(done.stdout.splitlines()) == 1 and "'spawn'" in done.stdout


def test_a_child_that_never_uses_mlx_notices_nothing() -> None:
    done = run("-c", FORK.format(before=LOAD.format("fastvlm"), inside="print('fine', flush=True)"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_child_forked_before_the_first_load_answers() -> None:
    inside = LOAD.format("fastvlm") + "; mlx_fastvlm.generate(model, processor, 'Hello')"
    done = run("-c", FORK.format(before="import mlx_fastvlm, mlx_mobileclip", inside=inside))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_end_waits_for_ended_threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12))
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(concurrency, "_workers", set())
    concurrency._wait_for_workers()
    assert not slept
    monkeypatch.setattr(concurrency, "_workers", {1 << 30})  # of no thread
    concurrency._wait_for_workers()
    assert not slept or not concurrency.TASKS.is_dir()
    monkeypatch.setattr(concurrency, "TASKS", Path("/nowhere"))
    slept.clear()
    concurrency._wait_for_workers()
    assert slept == [concurrency.FALLBACK_S]
