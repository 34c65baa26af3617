"""Unit tests of vectors, relevance, near duplicates, dates and EXIF data."""

import sqlite3
from datetime import date

import numpy as np
import pytest
from PIL import Image

from mlx_mobileclip.library import relevance
from mlx_mobileclip.library.metadata import Metadata, read_metadata
from mlx_mobileclip.library.near_duplicates import (
    connected_components,
    difference_hash,
    hamming_distance,
    near_pairs,
)
from mlx_mobileclip.library.queries import day_after, distance_km, first_day
from mlx_mobileclip.library.scan import matches_glob
from mlx_mobileclip.library.schema import FIRST_SCHEMA
from mlx_mobileclip.library.vectors import CHUNK_ROWS, Vectors, write_vectors


def unit_rows(count: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_float16_and_int8_scans_are_accurate() -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript(FIRST_SCHEMA)
    count, dim = 2 * CHUNK_ROWS + 77, 48
    rows = unit_rows(count, dim, 0).astype(np.float16)
    rows[5] = 0  # zeros and subnormal float16 values
    rows[6, :3] = [6e-8, -5e-5, 0]
    for start in range(0, count, 700):  # batches cross chunk boundaries
        end = min(start + 700, count)
        write_vectors(connection, range(start, end), rows[start:end])
    write_vectors(connection, [3, CHUNK_ROWS + 1], rows[[3, CHUNK_ROWS + 1]])
    vectors, queries = Vectors(connection, dim), unit_rows(3, dim, 1)
    expected = queries @ rows.astype(np.float32).T
    assert np.abs(vectors.scores(queries) - expected).max() < 1e-6
    for _ in range(2):
        assert np.abs(vectors.scores(queries) - expected).max() < 4e-3
    assert (vectors.rows([0, 6, count - 1]) == rows[[0, 6, count - 1]]).all()


def test_contrast_texts_replace_one_word() -> None:
    texts = relevance.contrast_texts("two red cars on a Beach")
    assert "three red cars on a Beach" in texts and "two blue cars on a Beach" in texts
    assert "two red dogs on a Beach" in texts and "two red cars on a river" in texts
    assert "two red cars on a Beach" not in texts
    assert relevance.contrast_texts("granny's garden party") == list(relevance.COMMON_TEXTS)
    assert len(relevance.contrast_texts(" ".join(["red dog"] * 100))) <= relevance.MAX_CONTRASTS


def test_false_discovery_rate() -> None:
    rng = np.random.default_rng(0)
    null_scores = np.sort(rng.standard_normal((200, 1000)))[:, ::-1].astype(np.float32)
    false_positives = [relevance.count_relevant(z[:256], 1000) for z in null_scores]
    assert sum(count > 0 for count in false_positives) <= 10  # 1 % is expected
    with_seven_relevant = np.concatenate([np.full(7, 6.0, np.float32), null_scores[0]])
    assert relevance.count_relevant(with_seven_relevant[:256], 1007) == 7 + false_positives[0]
    assert relevance.count_relevant(with_seven_relevant[:0], 1007) == 0


def test_hashes_and_components() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (9, 8, 3), np.uint8)).resize((200, 150))
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    original, mirrored = difference_hash(picture), difference_hash(other)
    assert hamming_distance(original, difference_hash(picture.resize((64, 48)))) <= 4
    assert hamming_distance(original, mirrored) > 20
    assert -(2**63) <= mirrored < 2**63 and hamming_distance(-1, 0) == 64
    hashes = [0, 0b1011, -1, 1 << 62, 0, -2]
    assert set(near_pairs(hashes)) >= {(0, 4), (0, 1), (0, 3), (2, 5)}
    assert connected_components([(4, 0), (1, 0), (2, 5)], 6) == [[0, 1, 4], [2, 5]]


def test_equal_hashes_give_linearly_many_pairs() -> None:
    assert len(list(near_pairs([0] * 5000))) < 5000


def test_dates_and_distances() -> None:
    assert (first_day("2024"), day_after("2024")) == (date(2024, 1, 1), date(2025, 1, 1))
    assert (first_day("2024-12"), day_after("2024-12")) == (date(2024, 12, 1), date(2025, 1, 1))
    assert day_after("2024-02-29") == date(2024, 3, 1)
    assert distance_km(52.52, 13.405, 48.137, 11.575) == pytest.approx(504, rel=0.01)
    assert distance_km(None, 0, 0, 0) is None  # type: ignore[arg-type]
    assert matches_glob("a/b/c.png", "b") and matches_glob("a/b/c.png", "a/*")
    assert matches_glob("c.png", "*.png")
    assert not matches_glob("a/b.png", "b")


@pytest.mark.parametrize(
    ("tags", "gps"),
    [
        ({0x0132: "0000:00:00 00:00:00"}, {}),
        ({0x0132: "2024:13:45 99:00:00"}, {}),
        ({0x0132: b"\xff" * 19, 0x0110: 7}, {}),
        ({}, {1: "N", 2: (91.0, 0.0, 0.0), 3: "E", 4: (1.0, 0.0, 0.0)}),
        ({}, {1: "N", 2: (1.0, 0.0, 0.0)}),
    ],
)
def test_invalid_exif_is_ignored(tags: dict[int, object], gps: dict[int, object]) -> None:
    image = Image.new("RGB", (4, 4))
    image.getexif().update(tags)
    image.getexif().get_ifd(0x8825).update(gps)
    assert read_metadata(image) == Metadata()


def test_camera_names_are_printable_and_short() -> None:
    image = Image.new("RGB", (4, 4))
    image.getexif().update({0x010F: "Canon\x1b[31m", 0x0110: "\u202eX" * 500})
    camera = read_metadata(image).camera
    assert camera and camera.isprintable() and len(camera) <= 80
