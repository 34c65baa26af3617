"""`python -m bench` at tiny sizes: it measures and records; figures are not checked."""

import json
import math
import sys
import time
from pathlib import Path

import pytest

from bench import cases, checkpoints, compare, worker
from bench.__main__ import main
from bench.cases import Case
from bench.power import Power

# Left out: buffers (own process), decode (mlx-lm; see below), mobileclip (full size only).
MEASURED = (
    *("pointwise", "depthwise", "attention", "half-precision", "prefill", "matrix-units"),
    *("tower", "answer"),
)


def test_contenders_take_turns(tmp_path: Path) -> None:
    case = Case("decode", "decode", ("ours", "mlx-lm", "nobody"), "tiny", tokens=3)
    absent: dict[str, str] = {}
    measured = compare.measure(case, checkpoints.write(case, tmp_path), 2, absent)
    assert list(measured) == ["ours", "mlx-lm"]
    for figures in measured.values():
        assert len(figures.seconds) == 2
        assert min(figures.seconds) > 0
        assert figures.peak_bytes > 20e6
    assert "nobody" in absent["nobody"]
    for row in compare._rows(case, measured):
        assert len(row) == 7


def test_failure_of_ours_ends_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="here: failed"):
        compare.measure(Case("here", "vision", ("ours",), "tiny"), tmp_path / "nothing", 1, {})


def test_results_before_ctrl_c_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([{"ours": compare.Measured([1.0], 1)}])

    def measure(*_: object) -> dict[str, compare.Measured]:
        try:
            return next(measured)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(compare, "measure", measure)
    record = tmp_path / "compare.json"
    main(["compare", "--size", "tiny", "--only", "p", "--record", str(record)])
    assert [result["name"] for result in json.loads(record.read_text())["results"]] == [
        "preprocess"
    ]
    assert "Interrupted at photo." in record.with_suffix(".md").read_text()
    with pytest.raises(SystemExit, match="130"):  # with nothing to keep
        main(["compare", "--size", "tiny", "--only", "photo"])


def test_unknown_case_is_refused() -> None:
    with pytest.raises(SystemExit, match="no case starts with x; choose from vision, first-token"):
        main(["compare", "--size", "tiny", "--only", "x"])


@pytest.mark.parametrize("size", ["tiny", "0.5b"])
def test_cases_have_contenders_and_names(size: str) -> None:
    found = cases.standard(size), cases.scaling(size)
    for several in found:
        assert len({case.name for case in several}) == len(several)
        for case in several:
            assert case.contenders[0] == compare.OURS
            for name in case.contenders:
                file = f"{worker.MODULES.get(name, name)}.py"
                assert (Path(worker.__file__).parent / "contenders" / file).is_file()


def test_mac_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "results" / "mac.json"
    only = [option for name in MEASURED for option in ("--only", name)]
    main(["mac", "--size", "tiny", "--repeats", "1", *only, "--record", str(record)])
    written = json.loads(record.read_text())
    assert written["date"] and written["machine"] and written["versions"]["mlx"]
    assert len(written["figures"]) > 30
    for figure in written["figures"]:
        assert math.isfinite(figure["value"]) and figure["value"] > 0, figure
    table = record.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out
    assert table.count("\n| ") == len(written["figures"]) + 1


def test_power_is_the_mean_of_reported_values() -> None:
    combined = "Combined Power (CPU + GPU + ANE):"
    lines = f"GPU Power: 9 mW\n{combined} 1500 mW\n\nidle\n{combined} 2500 mW"
    report = [sys.executable, "-c", f"print({lines!r})"]
    with Power(enabled=True, command=report) as power:
        started, until = 0.0, time.monotonic() + 20
        while power.mean(started) != 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert power.mean(started) == 2
        assert power.mean(time.monotonic()) is None


def test_power_is_unknown_without_a_reporter(capsys: pytest.CaptureFixture[str]) -> None:
    with Power(enabled=True, command=["/nowhere/powermetrics"]) as power:
        assert power.mean(0) is None
    assert "power is not measured" in capsys.readouterr().err
    with Power(enabled=False) as power:
        assert power.mean(0) is None
