"""Planted links in a checkpoint; only links of the Hub's cache are followed out of it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic

import convert
import mlx_fastvlm
import mlx_mobileclip
from convert.write import MAX_LICENCE_BYTES, MAX_LICENCES, copy_licence
from mlx_mobileclip.checkpoints.hub import DEMO_DIRECTORY, Checkpoint
from mlx_mobileclip.checkpoints.mobileclip import read_source
from mlx_mobileclip.errors import CheckpointError
from mlx_mobileclip.json_fields import check_link, read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_layout(tmp_path_factory.mktemp("model") / "sound", "llava_qwen2")


def snapshot(base: Path, sound: Path, repository: str = "models--org--name") -> Path:
    """Write a checkpoint as in the Hub's cache: links to blobs."""
    home = base / repository
    found = home / "snapshots" / COMMIT
    found.mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, path in enumerate(sound.iterdir()):
        shutil.copy(path, home / "blobs" / f"{i:040x}")
        (found / path.name).symlink_to(f"../../blobs/{i:040x}")
    (home / "blobs" / "licence").write_text("terms")
    (found / "LICENSE").symlink_to("../../blobs/licence")
    return found


def test_links_of_the_hub_cache_are_followed(sound: Path, tmp_path: Path) -> None:
    found = snapshot(tmp_path, sound)
    mlx_fastvlm.load(found)
    (tmp_path / "elsewhere").symlink_to(found)  # the user may give any name to it
    convert.convert(tmp_path / "elsewhere", tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def plain(base: Path, sound: Path) -> Path:
    return Path(shutil.copytree(sound, base / "snapshots" / "model"))


def not_a_commit(base: Path, sound: Path) -> Path:
    found = snapshot(base, sound)
    return found.rename(found.with_name("main"))


def not_a_repository(base: Path, sound: Path) -> Path:
    return snapshot(base, sound, "pictures")


DIRECTORIES = {"beside": plain, "no commit": not_a_commit, "no repository": not_a_repository}
TARGETS: dict[str, Callable[[Path, Path], None]] = {
    "a parent": lambda link, secret: link.symlink_to(secret),
    "through a link": lambda link, secret: (
        (link.parent / "hop").symlink_to(secret),
        link.symlink_to("hop"),
    ),
    "through blobs": lambda link, secret: (
        (link.parent.parent.parent / "blobs").mkdir(exist_ok=True),
        (link.parent.parent.parent / "blobs" / "x").symlink_to(secret),
        link.symlink_to("../../blobs/x"),
    ),
}


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize("target", TARGETS)
def test_planted_licence_link_is_not_copied(
    directory: str, target: str, sound: Path, tmp_path: Path
) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    found, output = DIRECTORIES[directory](tmp_path / "base", sound), tmp_path / "out"
    (found / "LICENSE").unlink(missing_ok=True)
    TARGETS[target](found / "LICENSE", tmp_path / "id_rsa")
    output.mkdir()
    assert copy_licence(found, output, "x", "y") == ["LICENSE"]
    assert [path.name for path in output.iterdir()] == ["NOTICE"]


def test_linked_blobs_directory_is_not_followed(sound: Path, tmp_path: Path) -> None:
    found = snapshot(tmp_path, sound)
    (tmp_path / "models--org--name" / "blobs").rename(tmp_path / "home")
    (tmp_path / "models--org--name" / "blobs").symlink_to(tmp_path / "home")
    with pytest.raises(CheckpointError, match="is a link to outside"):
        check_link(found / "LICENSE")


NAMES = ("config.json", "tokenizer.json", "model.safetensors", "processor_config.json")


@pytest.mark.parametrize("name", NAMES)
def test_links_of_fastvlm_files_are_refused(name: str, sound: Path, tmp_path: Path) -> None:
    source = Path(
        shutil.copytree(synthetic.write_layout(tmp_path / "x", "fast_vlm"), tmp_path / "s")
    )
    if not (source / name).exists():
        (source / name).write_text("{}")
    (source / name).rename(tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a link to outside the checkpoint"):
        mlx_fastvlm.load(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "merges.txt"])
def test_links_of_mobileclip_files_are_refused(name: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(DEMO_DIRECTORY, tmp_path / "demo"))
    (source / name).rename(tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a link to outside the checkpoint"):
        mlx_mobileclip.load(source)


def test_path_given_by_the_user_may_be_a_link(tmp_path: Path) -> None:
    sound = Path(shutil.copytree(DEMO_DIRECTORY, tmp_path / "demo"))
    (tmp_path / "alone").mkdir()
    weights = tmp_path / "alone" / "named.safetensors"
    weights.symlink_to(sound / "model.safetensors")
    with pytest.raises(CheckpointError, match="named like no known MobileCLIP"):  # it was read
        read_source(Checkpoint(weights, "x"))
    with pytest.raises(CheckpointError, match="is a link to outside the checkpoint"):
        read_source(Checkpoint(weights.parent, "x"))
    (tmp_path / "named.json").symlink_to(sound / "config.json")
    read_json(tmp_path / "named.json", follow_links=True)


def test_size_of_licences_is_bounded(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "LICENSE").touch()
    os.truncate(source / "LICENSE", 3 << 30)
    os.mkfifo(source / "LICENSE_PIPE")
    (source / "LICENSE_DEVICE").symlink_to("/dev/zero")
    (source / "LICENSE_GONE").symlink_to("nowhere")
    (source / "LICENSE_LOOP").symlink_to("LICENSE_LOOP")
    (source / "LICENSE.txt").write_bytes(bytes(MAX_LICENCE_BYTES))
    left_out = copy_licence(source, target, "x", "y")
    copied = {path.name: path.stat().st_size for path in target.iterdir()}
    assert copied.pop("NOTICE") < 1000
    assert copied == {"LICENSE.txt": MAX_LICENCE_BYTES}
    assert left_out == ["LICENSE", "LICENSE_DEVICE", "LICENSE_GONE", "LICENSE_LOOP", "LICENSE_PIPE"]
    for i in range(100):
        (source / f"LICENSE-{i}").write_text("x")
    assert len(copy_licence(source, target, "x", "y")) > 100 - MAX_LICENCES
