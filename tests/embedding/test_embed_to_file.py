"""Embedding into a file: formats, order, unreadable files, and resuming an interrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from standin import COLOURS, WIDTH, StandIn, StandInProcessor, paint

from mlx_mobileclip.embedding import writers
from mlx_mobileclip.embedding.embed_to_file import embed_images, embed_texts
from mlx_mobileclip.embedding.files import find_images
from mlx_mobileclip.embedding.lines import read_lines
from mlx_mobileclip.embedding.resume_log import ResumeLog
from mlx_mobileclip.errors import DataError

ROOT = Path(__file__).parents[2]
ORDER = ["a.JPG", "b.png", "z.png", "sub/c.png", "sub/deep/d.webp"]


def run(paths: list[str], output: Path, model: StandIn | None = None, **options: Any) -> Any:
    model = model or StandIn()
    return embed_images(model, StandInProcessor(), paths, output, **options)


def read(path: Path) -> tuple[list[str], np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path) as data:
            return json.loads(data["names"].tobytes()), data["embeddings"]
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["names"]), file.get_tensor("embeddings")


def test_names_may_start_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paint("~$x.png", "red")
    Path("~root").mkdir()
    paint("~root/y.png", "blue")
    found = ["./~$x.png", "./~root/y.png"]
    assert find_images(".") == found
    assert find_images("*.png") == find_images("~$*.png") == found[:1]
    assert find_images("~$x.png") == found[:1]
    Path("~$list").write_text("~nobodyx/a.jpg\n./~$x.png\n")
    paths = find_images("~$list")
    summary = run([*paths, *found], tmp_path / "x.npz")
    assert read(tmp_path / "x.npz")[0] == ["./~$x.png", *found]
    assert set(summary.skipped) == {"~nobodyx/a.jpg"}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_texts_survive_a_round_trip(tmp_path: Path, suffix: str) -> None:
    # As one array of texts these would take 36 GB.
    texts = ["a\0\0", "a\0", "long" * 225_000, *map(str, range(10_000)), '"\\\x7f\u2028\U0001f600']
    rows = [np.ones(2, np.float32)] * len(texts)
    writers.write_embeddings(tmp_path / f"x{suffix}", texts, rows, {})
    assert read(tmp_path / f"x{suffix}")[0] == texts


def test_names_are_measured_in_written_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ['a"\\', "\0\x7fé\u2028\U0001f600\udcff"]
    output = tmp_path / "x.safetensors"
    writers.write_embeddings(output, names, [np.ones(2, np.float32)] * 2, {})
    written = json.dumps(json.dumps(names)).encode()
    assert written in output.read_bytes()
    monkeypatch.setattr(writers, "MAX_NAMES_BYTES", len(written))
    writers.check_names(output, names)
    monkeypatch.setattr(writers, "MAX_NAMES_BYTES", len(written) - 1)
    writers.check_names(tmp_path / "x.npz", names)
    with pytest.raises(DataError, match="do not fit"):
        writers.check_names(output, names)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_images_are_embedded_in_order(
    photos: Path, tmp_path: Path, suffix: str, batch_size: int
) -> None:
    output = tmp_path / f"out{suffix}"
    paths = find_images(str(photos))
    summary = run(paths, output, batch_size=batch_size, name="standin")
    names, rows = read(output)
    assert names == [str(photos / name) for name in ORDER]
    assert rows.dtype == np.float32
    expected = StandIn().encode_image(StandInProcessor().images(names))
    np.testing.assert_allclose(rows, np.array(expected), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert (summary.total, summary.embedded, summary.resumed) == (7, 5, 0)
    assert set(summary.skipped) == {str(photos / "broken.jpg"), str(photos / "live.heic")}
    assert "sips" in summary.skipped[str(photos / "live.heic")]
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name, "photos"]


def test_metadata_of_safetensors(photos: Path, tmp_path: Path) -> None:
    run([str(photos / "b.png")], tmp_path / "x.safetensors", name="apple/MobileCLIP-S0")
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        about = file.metadata()
    assert about["model"] == "apple/MobileCLIP-S0"
    assert about["kind"] == "images"
    assert about["normalized"] == "true"
    assert len(about["fingerprint"]) == 64


def test_texts_are_embedded_in_order(tmp_path: Path) -> None:
    lines = tmp_path / "texts.txt"
    lines.write_bytes("a red bus\r\n\nein grünes Haus\na red bus\n".encode())
    output = tmp_path / "texts.npz"
    texts = [*read_lines(lines), "\udcff\udcfe"]
    summary = embed_texts(StandIn(), StandInProcessor(), texts, output)
    names, rows = read(output)
    assert names == ["a red bus", "", "ein grünes Haus", "a red bus"]
    expected = StandIn().encode_text(StandInProcessor().texts(names))
    np.testing.assert_allclose(rows, np.array(expected), atol=1e-6)
    assert list(summary.skipped.values()) == ["is not UTF-8"]


def test_parquet_without_pyarrow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        run(["x.png"], tmp_path / "x.parquet")


def test_parquet_has_the_same_rows(photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is written by pyarrow")
    paths = [str(photos / name) for name in ORDER]
    run(paths, tmp_path / "x.parquet")
    run(paths, tmp_path / "x.npz")
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table["name"].to_pylist() == paths
    assert table["embedding"].type.list_size == WIDTH
    np.testing.assert_array_equal(
        np.array(table["embedding"].to_pylist(), np.float32), read(tmp_path / "x.npz")[1]
    )


def test_output_is_checked_before_any_work(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "there.npz").write_text("precious")
    for name, match in (
        ("x.csv", "must end in"),
        ("x", "must end in"),
        ("there.npz", "already exists"),
        ("no/where.npz", "no directory"),
    ):
        with pytest.raises(DataError, match=match):
            run([str(photos / "b.png")], tmp_path / name)
    assert (tmp_path / "there.npz").read_text() == "precious"
    with pytest.raises(DataError, match="at least 1"):
        run([str(photos / "b.png")], tmp_path / "x.npz", batch_size=0)


def test_no_usable_image_is_an_error(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="none of the 2 images"):
        run([str(photos / "broken.jpg"), "gone.png"], tmp_path / "x.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("skipped ") for line in lines)


def test_non_finite_rows_are_skipped(photos: Path, tmp_path: Path) -> None:
    class Overflowing(StandIn):
        def encode_image(self, pixels: mx.array, normalize: bool = True) -> mx.array:
            rows = super().encode_image(pixels, normalize)
            blue = pixels.mean(axis=(1, 2))[:, 2:] > 0.5
            return mx.where(blue, float("nan"), rows)

    paths = [str(photos / name) for name in ORDER]
    summary = run(paths, tmp_path / "x.npz", Overflowing())
    assert list(summary.skipped.values()) == ["its embedding is not finite; try --dtype float32"]
    assert len(read(tmp_path / "x.npz")[0]) == 4


def test_unexpected_decoder_errors_are_skipped(photos: Path, tmp_path: Path) -> None:
    class Odd(StandInProcessor):
        def pixels(self, source: Any) -> Any:
            if source.endswith("b.png"):
                raise MemoryError("no\nmemory")
            return super().pixels(source)

    paths = [str(photos / name) for name in ORDER]
    summary = embed_images(StandIn(), Odd(), paths, tmp_path / "x.npz")
    assert summary.skipped == {str(photos / "b.png"): "MemoryError: no memory"}


def test_control_characters_in_names_are_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "a\x1b[2Jb\n\udcff.png"
    evil.write_bytes(b"x")
    good = paint(tmp_path / "good.png", "red")
    run([str(evil), good], tmp_path / "x.npz")
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert err.count("\n") == 1


# Resuming.


def interrupted(after: int) -> StandIn:
    class Interrupted(StandIn):
        def encode_image(self, pixels: mx.array, normalize: bool = True) -> mx.array:
            if len(self.image_batches) == after:
                raise KeyboardInterrupt
            return super().encode_image(pixels, normalize)

    return Interrupted()


def paint_many(tmp_path: Path, count: int = 12) -> list[str]:
    return [paint(tmp_path / f"{i:03}.png", COLOURS[i % 3], seed=i) for i in range(count)]


def test_resumes_after_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = paint_many(tmp_path)
    output, whole = tmp_path / "x.npz", tmp_path / "whole.npz"
    run(paths, whole, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run(paths, output, interrupted(3), batch_size=2)
    assert not output.exists()
    assert "6 of 12 images are done" in capsys.readouterr().err
    partial = tmp_path / "x.npz.partial"
    with partial.open("ab") as file:
        file.write(b"MCE1 torn off")
    # Meanwhile one finished image changes, one is removed and one is added.
    paint(paths[1], "blue", seed=99)
    paths = paths[:4] + paths[5:] + [paint(tmp_path / "new.png", "red", seed=50)]
    model = StandIn()
    summary = run(paths, output, model, batch_size=2, quiet=False)
    assert sum(model.image_batches) == 8
    assert (summary.resumed, summary.embedded) == (4, 12)
    assert "4 of 12 are done" in capsys.readouterr().err
    names, rows = read(output)
    assert names == paths
    expected = StandIn().encode_image(StandInProcessor().images(paths))
    np.testing.assert_allclose(rows, np.array(expected), atol=1e-6)
    assert not partial.exists()


def test_damaged_batch_is_embedded_again(tmp_path: Path) -> None:
    paths = paint_many(tmp_path, 6)
    output, partial = tmp_path / "x.npz", tmp_path / "x.npz.partial"
    with pytest.raises(KeyboardInterrupt):
        run(paths, output, interrupted(2), batch_size=2)
    data = bytearray(partial.read_bytes())
    data[-3] ^= 1
    partial.write_bytes(data)
    assert run(paths, output, batch_size=2).resumed == 2
    expected = StandIn().encode_image(StandInProcessor().images(paths))
    np.testing.assert_allclose(read(output)[1], np.array(expected), atol=1e-6)


@pytest.mark.parametrize("damage", ["header", "other model", "garbage", "length", "link", "pipe"])
def test_unusable_log_is_refused_and_kept(tmp_path: Path, damage: str) -> None:
    paths = paint_many(tmp_path, 6)
    output, partial = tmp_path / "x.npz", tmp_path / "x.npz.partial"
    with pytest.raises(KeyboardInterrupt):
        run(paths, output, interrupted(2), batch_size=2)
    data = bytearray(partial.read_bytes())
    if damage == "header":
        data[20] ^= 1
    elif damage == "garbage":
        data[:] = os.urandom(500)
    elif damage == "length":
        data[4:8] = b"\xff\xff\xff\xff"
    partial.write_bytes(data)
    if damage == "link":
        partial.rename(tmp_path / "precious")
        partial.symlink_to(tmp_path / "precious")
    elif damage == "pipe":
        partial.unlink()
        os.mkfifo(partial)
    model = StandIn(seed=3 if damage == "other model" else 0)
    match = "other weights, .* finish that run" if damage == "other model" else "another --output"
    with pytest.raises(DataError, match=match):
        run(paths, output, model, batch_size=2)
    assert model.image_batches == []
    assert damage == "pipe" or partial.read_bytes() == data


def test_name_of_the_model_does_not_matter(tmp_path: Path) -> None:
    paths = paint_many(tmp_path, 6)
    with pytest.raises(KeyboardInterrupt):
        run(paths, tmp_path / "x.npz", interrupted(2), batch_size=2, name="org/m")
    assert run(paths, tmp_path / "x.npz", batch_size=3, name="/models/m/").resumed == 4
    with np.load(tmp_path / "x.npz") as data:
        assert data["model"] == "/models/m/"


def test_run_without_rows_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(paint_many(tmp_path, 2), tmp_path / "x.npz", interrupted(0))
    assert not list(tmp_path.glob("x.npz*"))


def test_file_systems_without_locks_are_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("mlx_mobileclip.embedding.resume_log.fcntl.flock", refuse)
    assert run(paint_many(tmp_path, 2), tmp_path / "x.npz").embedded == 2


def test_two_runs_cannot_share_an_output(tmp_path: Path) -> None:
    paths = paint_many(tmp_path, 2)
    with ResumeLog(tmp_path / "x.npz", {}), pytest.raises(DataError, match="another run"):
        run(paths, tmp_path / "x.npz")


def test_failed_write_keeps_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = paint_many(tmp_path, 4)
    output = tmp_path / "x.npz"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writers.np, "savez", full)
        with pytest.raises(DataError, match="finished rows are kept"):
            run(paths, output)
    assert not output.exists()
    assert not list(tmp_path.glob("*.tmp"))
    model = StandIn()
    assert run(paths, output, model).resumed == 4
    assert model.image_batches == []


def test_resumes_after_kill_9(tmp_path: Path) -> None:
    paths = paint_many(tmp_path, 30)
    output, partial = tmp_path / "x.safetensors", tmp_path / "x.safetensors.partial"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import standin\n"
        "from mlx_mobileclip.embedding.embed_to_file import embed_images\n"
        "model, processor = standin.load()\n"
        "embed_images(model, processor, sys.argv[3:], sys.argv[2], batch_size=2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT / "tests/support"), str(output), *paths],
        env=os.environ | {"STANDIN_SECONDS": "0.1", "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if partial.exists() and partial.stat().st_size > 1000:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.exists()
    assert not output.exists()
    summary = run(paths, output)
    assert 0 < summary.resumed < 30
    names, rows = read(output)
    assert names == paths
    expected = StandIn().encode_image(StandInProcessor().images(paths))
    np.testing.assert_allclose(rows, np.array(expected), atol=1e-6)
    assert not partial.exists()
