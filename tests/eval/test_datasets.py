"""Readers of the data sets."""

from pathlib import Path

import pytest

from mlx_mobileclip.errors import DataError
from mlx_mobileclip.eval import datasets
from mlx_mobileclip.eval.zero_shot import imagenet_classes, imagenet_wordnet_ids


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "x.png").touch()
    return root


def test_wordnet_ids_are_those_of_imagenet() -> None:
    ids = imagenet_wordnet_ids()
    assert len(set(ids)) == len(imagenet_classes()) == 1000
    assert list(ids) == sorted(ids)
    # Tench, goldfish, golden retriever, toilet paper: the indices of OpenAI's names.
    assert (ids[0], ids[1], ids[207], ids[999]) == (
        *("n01440764", "n01443537"),
        *("n02099601", "n15075141"),
    )


@pytest.mark.parametrize("numbered", [False, True])
def test_subsets_keep_their_classes(tmp_path: Path, numbered: bool) -> None:
    chosen = [999, 2, 10, 207]
    names = [str(i) if numbered else imagenet_wordnet_ids()[i] for i in chosen]
    paths, targets = datasets.imagenet_images(folders(tmp_path / "val", *names, ".hidden"))
    assert targets == sorted(chosen)
    assert [Path(p).parent.name for p in paths] == [names[chosen.index(t)] for t in targets]


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "dog"),
        ("n01440764", "dog"),
        ("n01440764", "7"),
        ("n99999999",),
        ("1000",),
        ("01", "1"),
        ("\u0661",),  # a non-ASCII digit
        ("n01440764 ",),
        tuple(f"class{i}" for i in range(1000)),
        tuple(f"n{i:08}" for i in range(1000)),
    ],
)
def test_unknown_imagenet_classes_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"not an ImageNet class; .*--classes-from-folders"):
        datasets.imagenet_images(folders(tmp_path / "val", *names))


def test_custom_classes_from_folders(tmp_path: Path) -> None:
    root = folders(tmp_path / "val", "red heart", "blue, star")
    (root / "notes.txt").touch()
    paths, targets, labels = datasets.folder_classes(root)
    assert labels == ["blue, star", "red heart"]
    assert [Path(p).parent.name for p in paths] == [labels[t] for t in targets]
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="empty: contains no image"):
        datasets.folder_classes(root)


def test_directories_without_classes_are_refused(tmp_path: Path) -> None:
    for read in (datasets.folder_classes, datasets.imagenet_images):
        with pytest.raises(DataError, match="contains no directories"):
            read(tmp_path)
        with pytest.raises(DataError, match="no such directory"):
            read(tmp_path / "none")
