"""Updating a finished output."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from standin import COLOURS, StandIn, StandInProcessor, paint

from mlx_mobileclip.embedding import writers
from mlx_mobileclip.embedding.embed_to_file import embed_images, embed_texts
from mlx_mobileclip.embedding.readers import read_embeddings
from mlx_mobileclip.errors import DataError

SUFFIXES = [".safetensors", ".npz", ".parquet"]


def run(paths: list[str], output: Path, model: StandIn | None = None, **options: Any) -> Any:
    return embed_images(model or StandIn(), StandInProcessor(), paths, output, **options)


def paint_many(tmp_path: Path, count: int = 6) -> list[str]:
    return [paint(tmp_path / f"{i:03}.png", COLOURS[i % 3], seed=i) for i in range(count)]


def assert_embeddings(output: Path, names: list[str]) -> None:
    stored = read_embeddings(output)
    assert [name for name, _ in stored.keys] == names
    expected = StandIn().encode_image(StandInProcessor().images(names))
    np.testing.assert_allclose(stored.rows, np.array(expected), atol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_new_changed_removed_and_kept_images(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet is written by pyarrow")
    paths, output = paint_many(tmp_path), tmp_path / f"x{suffix}"
    run(paths[:5], output, name="org/m")
    output.chmod(0o640)
    paint(paths[1], "blue", seed=99)
    Path(paths[2]).unlink()
    model = StandIn()
    summary = run([p for p in paths if p != paths[2]], output, model, update=True, name="./m")
    assert sum(model.image_batches) == 2
    assert (summary.total, summary.embedded, summary.kept, summary.dropped) == (5, 5, 3, 1)
    assert_embeddings(output, [p for p in paths if p != paths[2]])
    assert output.stat().st_mode & 0o777 == 0o640
    # Images not named in the call stay; those that have changed are embedded again.
    paint(paths[0], "green", seed=50)
    more = paint(tmp_path / "more.png", "red")
    model = StandIn()
    assert run([more], output, model, update=True).kept == 4
    assert sum(model.image_batches) == 2
    assert_embeddings(output, [more, *(p for p in paths if p != paths[2])])
    before = output.stat().st_mtime_ns
    assert run([more], output, model, update=True).kept == 6
    assert output.stat().st_mtime_ns == before
    assert sum(model.image_batches) == 2
    assert run(paths[3:], tmp_path / f"new{suffix}", update=True).embedded == 3


def test_images_removed_with_their_folder(tmp_path: Path) -> None:
    """Rows of a missing folder are kept, in case of an unmounted disk, unless a parent is given."""
    for folder in ("a", "b", "b/c", "disk"):
        (tmp_path / folder).mkdir()
    paths = [paint(tmp_path / f"{d}/x.png", "red", seed=i) for i, d in enumerate(("a", "b", "b/c"))]
    absent = paint(tmp_path / "disk/x.png", "blue")
    output = tmp_path / "x.npz"
    run([*paths, absent], output)
    expected = StandIn().encode_image(StandInProcessor().images([paths[0], absent]))
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    Path(paths[2]).unlink()
    Path(paths[2]).parent.rmdir()
    searched = [str(tmp_path / folder) for folder in ("a", "b")]
    Path(paths[1]).unlink()
    assert run(paths[:1], output, update=True).dropped == 1  # its folder is still there
    assert run(paths[:1], output, update=True, directories=searched).dropped == 1
    stored = read_embeddings(output)
    assert [name for name, _ in stored.keys] == [paths[0], absent]
    np.testing.assert_allclose(stored.rows, np.array(expected), atol=1e-6)
    (tmp_path / "elsewhere").rename(tmp_path / "disk")
    assert run(paths[:1], output, update=True).kept == 2
    (tmp_path / "disk/x.png").unlink()
    assert run(paths[:1], output, update=True).dropped == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_output_without_stamps_is_embedded_again(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet is written by pyarrow")
    paths, output = paint_many(tmp_path), tmp_path / f"x{suffix}"
    run(paths, output)
    stored = read_embeddings(output)
    writers.write_embeddings(
        output, paths, list(stored.rows[::-1]), stored.metadata, replace=True
    )  # wrong rows
    assert all(stamp == "" for _, stamp in read_embeddings(output).keys)
    Path(paths[5]).unlink()
    summary = run(paths[:2], output, update=True)
    assert (summary.kept, summary.dropped, summary.embedded) == (0, 1, 5)
    assert_embeddings(output, paths[:5])


def test_other_weights_and_foreign_files_are_refused(tmp_path: Path) -> None:
    paths, output = paint_many(tmp_path), tmp_path / "x.safetensors"
    run(paths, output)
    data = output.read_bytes()
    for call in (
        lambda: run(paths, output, StandIn(seed=3), update=True),
        lambda: embed_texts(StandIn(), StandInProcessor(), ["a"], output, update=True),
    ):
        with pytest.raises(DataError, match=r"was made with other weights, .* another --output"):
            call()
    assert output.read_bytes() == data
    rows = np.ones((2, 12), np.float32)
    for broken in (
        {"embeddings": rows},
        {"embeddings": rows, "names": '["a"]'},
        {"embeddings": rows, "names": '["a", 1]'},
        {"embeddings": rows, "names": '["a", "b"]', "stamps": '["a"]'},
        {"embeddings": rows * np.nan, "names": '["a", "b"]'},
        {"embeddings": rows.astype(np.float16), "names": '["a", "b"]'},
        {"names": "[]"},
    ):
        arrays = {k: v for k, v in broken.items() if not isinstance(v, str)}
        save_file(arrays, output, {k: v for k, v in broken.items() if isinstance(v, str)})
        with pytest.raises(DataError, match="cannot be read as embeddings"):
            run(paths, output, update=True)
    for name in ("y.npz", "y.safetensors", "y.parquet"):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(DataError, match="cannot be read as embeddings"):
            run(paths, tmp_path / name, update=True)
    assert not list(tmp_path.glob("*.partial"))


def test_old_output_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(StandIn):
        def encode_image(self, pixels: mx.array, normalize: bool = True) -> mx.array:
            if self.image_batches:
                raise KeyboardInterrupt
            return super().encode_image(pixels, normalize)

    paths, output = paint_many(tmp_path), tmp_path / "x.npz"
    run(paths[:2], output)
    data = output.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(paths, output, Interrupted(), batch_size=2, update=True)
    with monkeypatch.context() as patch:
        patch.setattr(writers.np, "savez", lambda *_, **__: os.truncate(tmp_path / "none", 0))
        with pytest.raises(DataError, match="cannot be written"):
            run(paths, output, update=True)
    assert output.read_bytes() == data
    summary = run(paths, output, update=True)
    assert (summary.kept, summary.resumed) == (2, 4)
    assert_embeddings(output, paths)
    for path in paths:
        Path(path).unlink()
    data = output.read_bytes()
    with pytest.raises(DataError, match="none of the 6 images"):
        run(paths, output, update=True)
    assert output.read_bytes() == data


def test_non_utf8_names_and_linked_outputs(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet is written by pyarrow")
    odd, literal = tmp_path / os.fsdecode(b"a\xff.png"), tmp_path / r"a\udcff.png"
    paths = [paint(odd, "red"), paint(literal, "blue")]
    for suffix in SUFFIXES:
        real, output = tmp_path / f"real{suffix}", tmp_path / f"x{suffix}"
        run(paths, real)
        output.symlink_to(real)
        summary = run(paths, output, update=True)
        assert summary.kept == (1 if suffix == ".parquet" else 2)
        assert output.is_symlink()
        np.testing.assert_allclose(
            read_embeddings(real).rows,
            np.array(StandIn().encode_image(StandInProcessor().images(paths))),
            atol=1e-6,
        )


def test_texts_are_extended(tmp_path: Path) -> None:
    output, model = tmp_path / "x.safetensors", StandIn()
    embed_texts(model, StandInProcessor(), ["red", "green", "red"], output)
    summary = embed_texts(model, StandInProcessor(), ["blue", "red"], output, update=True)
    assert (summary.kept, summary.embedded, model.texts_seen) == (2, 3, 2 + 1)
    with safe_open(output, framework="numpy") as file:
        assert json.loads(file.metadata()["names"]) == ["blue", "red", "green"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_formats_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    paths = paint_many(tmp_path, 1)
    before = os.umask(umask)
    try:
        for suffix in SUFFIXES:
            run(paths, tmp_path / f"x{suffix}")
            assert (tmp_path / f"x{suffix}").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)
