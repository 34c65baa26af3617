"""Search: relevance, combined texts and images, filters and caches."""

import os
from pathlib import Path

import pytest
from library_scenes import NAMES
from PIL import Image

import mlx_mobileclip.loader
from mlx_mobileclip import DataError, Library, Match, SearchResults


def index_of(match: Match) -> int:
    return int(Path(match.path).stem[1:])


def test_matching_photos_rank_first(indexed: Path) -> None:
    with Library(indexed) as library:
        best = []
        for name in sorted(set().union(*NAMES)):
            results = library.search(f"a {name}", everything=True, k=40)
            best.append(name in NAMES[index_of(results[0])])
            assert [m.relevance for m in results] == sorted(
                (m.relevance for m in results), reverse=True
            )
        assert sum(best) >= 0.8 * len(best) >= 20


def test_absent_objects_give_no_result(indexed: Path) -> None:
    all_names = set().union(*NAMES)
    absent_texts = [f"a {c} {k}" for c in ("purple", "black") for k in ("heart", "cross", "star")]
    absent_texts = [text for text in absent_texts if text[2:] not in all_names]
    absent_texts.append("a steam locomotive")
    with Library(indexed) as library:
        answers = [library.search(text) for text in absent_texts]
    assert absent_texts and sum(not answer for answer in answers) >= 0.8 * len(absent_texts)
    no_result = next(answer for answer in answers if not answer)
    assert no_result.nearest is not None and "no photo shows this" in no_result.summary()


def test_small_libraries_are_not_calibrated(library: Library, few: Path) -> None:
    library.index(few, model="demo")
    results = library.search("a steam locomotive", k=3)
    assert len(results) == 3 and not results.calibrated
    assert "without a relevance threshold" in results.summary()


def test_search_by_image(indexed: Path, drawn: Path, tmp_path: Path) -> None:
    with Library(indexed) as library:
        results = library.search(like=drawn / "s07.png", everything=True)
        assert index_of(results[0]) == 7 and results[0].score == pytest.approx(1, abs=1e-3)
        Image.open(drawn / "s07.png").save(tmp_path / "other.bmp")  # needs the image tower
        again = library.search(like=tmp_path / "other.bmp", everything=True)
        assert again.paths == results.paths


def test_repeated_queries_need_no_model(
    copied: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Library(copied) as library:
        first = library.search("a red circle", also="a blue star", without="a heart", k=5)
    for name in ("load", "load_text_tower", "read_canonical"):
        monkeypatch.setattr(mlx_mobileclip.loader, name, lambda *_, **__: pytest.fail("loaded"))
    with Library(copied) as library:
        again = library.search("a red circle", also="a blue star", without="a heart", k=5)
        assert library.search(like=drawn / "s01.png")
    assert again.to_list() == first.to_list()


def test_only_the_text_tower_is_loaded(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_mobileclip.loader, "load_checkpoint", lambda *_: pytest.fail("whole"))
    with Library(copied) as library:
        assert library.search("a query that nobody has asked yet", everything=True)
    model, _ = mlx_mobileclip.loader.load_text_tower("demo")
    assert "image" not in model


def test_also_and_without(indexed: Path) -> None:
    with Library(indexed) as library:
        one = library.search("a red circle", everything=True, k=40)
        both = library.search("a red circle", also="a blue star", everything=True, k=40)
        assert {m.path for m in one} == {m.path for m in both}
        relevance = {m.path: m.relevance for m in one}
        # Mean and std are from a scan, which is accurate to 0.002.
        assert all(m.relevance <= relevance[m.path] + 0.02 for m in both)
        [name, *_] = next(names for names in NAMES if len(names) == 1)
        best = library.search(f"a {name}", everything=True).paths[0]
        less = library.search("a red circle", without=f"a {name}", everything=True, k=40)
        assert best not in less.paths and 30 < len(less) < 40


@pytest.fixture
def dated(library: Library, few: Path) -> Library:
    """Five photos with dates, cameras and places."""
    for i, (year, camera, place) in enumerate(
        [(2023, "A", 52.5), (2024, "A", 52.6), (2024, "B", 10.0), (2025, "B", None)]
    ):
        image = Image.open(few / f"s{i}.png").convert("RGB")
        exif = Image.Exif()
        exif[0x010F], exif[0x0110] = "Maker", f"Maker {camera}"
        exif.get_ifd(0x8769)[0x9003] = f"{year}:05:0{i + 1} 12:00:00"
        if place is not None:
            degrees = (float(int(place)), (place % 1) * 60, 0.0)
            exif.get_ifd(0x8825).update({1: "N", 2: degrees, 3: "W", 4: (13.0, 24.0, 0.0)})
        image.save(few / f"d{i}.jpg", exif=exif)
        (few / f"s{i}.png").unlink()
    (few / "s4.png").unlink()
    library.index(few, model="demo")
    return library


def names(results: SearchResults) -> list[str]:
    return [Path(path).stem for path in results.paths]


def test_filters(dated: Library, few: Path) -> None:
    assert names(dated.search(sort="date")) == ["d3", "d2", "d1", "d0"]
    assert names(dated.search(since="2024", until="2024")) == ["d2", "d1"]
    assert names(dated.search(since="2024-05-03")) == ["d3", "d2"]
    assert names(dated.search(until="2023-05-01")) == ["d0"]
    assert names(dated.search(camera="maker b")) == ["d3", "d2"]
    assert names(dated.search(near=(52.5, -13.4, 1))) == ["d0"]
    assert names(dated.search(near=(52.5, -13.4, 20))) == ["d1", "d0"]
    assert names(dated.search(kinds="JPEG")) == ["d3", "d2", "d1", "d0"]
    assert not dated.search(kinds="png")
    assert len(dated.search("a red circle", since="2024", folder=few)) == 3
    match = dated.search(until="2023")[0]
    assert (match.taken, match.camera) == ("2023-05-01T12:00:00", "Maker A")
    assert (match.latitude, match.longitude) == pytest.approx((52.5, -13.4))
    assert (match.width, match.height) == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": " "}, "empty"),
        ({"text": "\udcff"}, "UTF-8"),
        ({"text": "x", "k": 0}, "at least 1"),
        ({"text": "x", "sort": "name"}, "cannot sort"),
        ({"since": "May"}, "not a date"),
        ({"until": "2024-13"}, "not a date"),
        ({"near": (100, 0, 1)}, "degrees"),
        ({"folder": "/nowhere"}, "not in the index"),
        ({"without": "x"}, "what to look for"),
    ],
)
def test_invalid_queries_are_errors(
    indexed: Path, options: dict[str, object], message: str
) -> None:
    with Library(indexed) as library, pytest.raises(DataError, match=message):
        library.search(**options)  # type: ignore[arg-type]


def test_orientation_is_applied(library: Library, few: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(few / "s0.png").resize((80, 40)).save(few / "turned.jpg", exif=exif)
    library.index(few, model="demo")
    [match] = [m for m in library.search(k=9) if m.path.endswith("turned.jpg")]
    assert (match.width, match.height) == (40, 80)


def test_dedupe_and_duplicates(library: Library, few: Path) -> None:
    image = Image.open(few / "s0.png")
    image.resize((96, 96)).save(few / "again.jpg", quality=80)
    os.link(few / "s1.png", few / "copy.png")
    library.index(few, model="demo")
    assert library.duplicates("exact") == [[str(few / "copy.png"), str(few / "s1.png")]]
    near = [{Path(p).name for p in group} for group in library.duplicates("near")]
    assert sorted(map(sorted, near)) == [["again.jpg", "s0.png"], ["copy.png", "s1.png"]]
    assert library.duplicates("near")[0][0].endswith("again.jpg")  # the largest first
    [everything] = library.duplicates("similar", threshold=-1)
    assert len(everything) == 7
    assert len(library.search("a red circle", everything=True, dedupe=True)) == 5
    with pytest.raises(DataError, match="level"):
        library.duplicates("close")


def test_result_formats(indexed: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pip install pandas, for to_pandas")
    with Library(indexed) as library:
        results = library.search("a red circle", everything=True, k=4)
    assert len(results[1:3]) == 2 and results[-1] == list(results)[3]
    frame = results.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame["path"]) == results.paths
    assert results.to_list()[0]["path"] == results.paths[0]
    assert results._repr_html_().count("data:image/jpeg;base64,") == 4
    assert "4" in repr(results)
