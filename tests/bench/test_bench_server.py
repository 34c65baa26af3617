"""`python -m bench server` at a tiny size: no wrong answer; times are not checked."""

import json
from pathlib import Path

import pytest

from bench import server
from bench.__main__ import main


@pytest.mark.stress
def test_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IMAGES", 3)
    record = tmp_path / "record.json"
    main(["server", "--requests", "60", "--clients", "6", "--timed", "9", "--record", str(record)])
    figures = json.loads(record.read_text())
    assert figures["wrong"] == [] and sum(figures["counts"].values()) == 60
    assert figures["counts"].keys() == server.KINDS.keys()
    assert figures["throughput"].keys() == {"known", "fresh"}


def test_wrong_answers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(server.Task):
        def __init__(self) -> None:
            self.name, self.uris = "demo", ["data:"]
            self.answers = {(question, None): "right" for question in server.TEXT_QUESTIONS}

    class Wrongly(server.Server):
        def __init__(self) -> None:
            self.said = "wrong"

        def post(self, path: str, body: bytes) -> tuple[int, bytes]:
            return 200, json.dumps({"choices": [{"message": {"content": self.said}}]}).encode()

        def stream(self, body: object) -> tuple[str, float, int]:
            return self.said, 0.1, 1

        def memory_mb(self) -> float:
            return 1.0

    live = Wrongly()
    monkeypatch.setattr(server, "KINDS", {"text": 1})
    for said, wrong in (("wrong", 10), ("right", 0)):
        live.said = said
        soak = server.Soak(live, Wrong(), 10)
        soak.run(2)
        assert len(soak.wrong) == wrong and soak.counts == {"text": 10}
