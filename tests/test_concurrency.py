"""Models work in any thread, processes exit cleanly, and forked children get an error."""

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


def run_cold_threads(kind: str) -> None:
    result = run(COLD, kind, 8)
    assert result.returncode == 0, (kind, result.returncode, result.stderr[-2000:])
    found, expected = json.loads(result.stdout)
    assert found == expected
    assert len({json.dumps(answer) for answer in found}) > 1  # not all equal


@pytest.mark.parametrize("kind", KINDS)
def test_cold_threads_are_answered_and_the_process_exits_cleanly(kind: str) -> None:
    for _ in range(2):
        run_cold_threads(kind)


@pytest.mark.stress
@pytest.mark.parametrize("kind", KINDS)
def test_cold_threads_a_hundred_times(kind: str) -> None:
    for _ in range(25):
        run_cold_threads(kind)


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
def test_child_forked_after_loading_gets_a_one_line_error(package: str, inside: str) -> None:
    result = run("-c", FORK.format(before=LOAD.format(package), inside=inside))
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("ModelError this process was forked from one that had loaded a")
    assert len(result.stdout.splitlines()) == 1 and "'spawn'" in result.stdout


def test_forked_child_that_does_not_use_mlx_works() -> None:
    result = run(
        "-c", FORK.format(before=LOAD.format("fastvlm"), inside="print('fine', flush=True)")
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")


def test_child_forked_before_the_first_load_works() -> None:
    inside = LOAD.format("fastvlm") + "; mlx_fastvlm.generate(model, processor, 'Hello')"
    result = run("-c", FORK.format(before="import mlx_fastvlm, mlx_mobileclip", inside=inside))
    assert (result.returncode, result.stderr) == (0, "")


def test_exit_waits_for_ended_threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12))
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(concurrency, "_workers", set())
    concurrency._wait_for_workers()
    assert not slept
    monkeypatch.setattr(concurrency, "_workers", {1 << 30})  # not the id of a thread
    concurrency._wait_for_workers()
    assert not slept or not concurrency.TASKS.is_dir()
    monkeypatch.setattr(concurrency, "TASKS", Path("/nowhere"))
    slept.clear()
    concurrency._wait_for_workers()
    assert slept == [concurrency.FALLBACK_S]
