"""Images are encoded once; what is kept is never wrong."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
from PIL import Image

from mlx_fastvlm import FastVLM, ImageCache, ModelError, Processor, generate, load
from mlx_fastvlm.processor import Picture
from mlx_mobileclip import disk_cache

SCENE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[FastVLM, Processor]:
    return load(checkpoint)


@pytest.fixture
def tiny(loaded: tuple[FastVLM, Processor]) -> tuple[FastVLM, Processor]:
    loaded[0].image_cache = ImageCache()
    return loaded


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is done to images: "pixels" for each that is resized, "encode" for each encoded."""
    done: list[str] = []
    pixels, encode = Picture.pixels, FastVLM.encode_image
    monkeypatch.setattr(Picture, "pixels", lambda *a: done.append("pixels") or pixels(*a))
    monkeypatch.setattr(FastVLM, "encode_image", lambda *a: done.append("encode") or encode(*a))
    yield done


def ask(tiny: tuple[FastVLM, Processor], images: Any, **options: Any) -> list[int]:
    return generate(*tiny, "the", images, max_tokens=4, **options).token_ids


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_a_second_question_neither_resizes_nor_encodes(
    tiny: tuple[FastVLM, Processor], work: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(png(SCENE))
    first = generate(*tiny, "the", path, max_tokens=4)
    assert work == ["pixels", "encode"]
    again = generate(*tiny, "the", path.read_bytes(), max_tokens=4)
    assert again.token_ids == first.token_ids and again.stats.image_tokens == 16
    assert first.stats.vision_s > 0 == again.stats.vision_s
    assert generate(*tiny, "another", str(path), max_tokens=4).stats.image_tokens == 16
    assert work == ["pixels", "encode"]
    ask(tiny, SCENE)  # not encoded as a file: content of its own
    ask(tiny, Image.fromarray(SCENE))
    assert work == ["pixels", "encode"] * 2


def test_what_is_kept_is_what_was_computed(tiny: tuple[FastVLM, Processor]) -> None:
    model, processor = tiny
    pixels = processor("the", SCENE).pixels
    assert pixels is not None
    ask(tiny, SCENE)
    (picture,) = processor.prepare("the", SCENE)[1]
    kept = model.image_cache.get(model, picture.key, 16)
    assert kept is not None and mx.array_equal(kept, model.encode_image(pixels)).item()


def test_another_content_size_or_mode_is_another_image(
    tiny: tuple[FastVLM, Processor], work: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(png(SCENE))
    ask(tiny, path)
    for options in ({"resolution": 128}, {"image_mode": "crop"}):
        ask(tiny, path, **options)
    path.write_bytes(png(255 - SCENE))  # the name is the same, the answer must not be
    ask(tiny, path)
    ask(tiny, SCENE.reshape(40, 30, 3))
    ask(tiny, SCENE)  # the same bytes in another shape
    assert work.count("encode") == 6


def test_an_image_twice_in_a_prompt_is_encoded_once(
    tiny: tuple[FastVLM, Processor], work: list[str]
) -> None:
    model, processor = tiny
    images = [SCENE, 255 - SCENE, SCENE]
    answer = ask(tiny, images)
    assert work.count("encode") == 2
    inputs = processor("the", images)
    assert inputs.pixels is not None
    plain = model(inputs.input_ids[None], pixels=inputs.pixels)[0, -1, : processor.tokenizer.size]
    assert answer[0] == mx.argmax(plain).item()


def test_memory_is_bounded(tiny: tuple[FastVLM, Processor], work: list[str]) -> None:
    model, _ = tiny
    images = [np.full((8, 8, 3), value, np.uint8) for value in range(3)]
    ask(tiny, images[0])
    (one,) = model.image_cache._entries.values()
    model.image_cache = ImageCache(max_bytes=2 * one.nbytes)
    work.clear()
    for i in (0, 1, 0, 2):  # 1 makes room for 2, as it was not used for longest
        ask(tiny, images[i])
    assert work.count("encode") == 3
    ask(tiny, images[0])
    assert work.count("encode") == 3
    ask(tiny, images[1])
    assert work.count("encode") == 4
    assert sum(entry.nbytes for entry in model.image_cache._entries.values()) == 2 * one.nbytes
    model.image_cache = ImageCache(max_bytes=0)
    ask(tiny, images[0])
    ask(tiny, images[0])
    assert work.count("encode") == 6


def test_new_weights_forget_what_the_old_ones_saw(checkpoint: Path, work: list[str]) -> None:
    model, processor = load(checkpoint)
    before = ask((model, processor), SCENE)
    bias = model.vision_tower.stem.conv_bias
    model.vision_tower.stem.conv_bias = bias + 5
    ask((model, processor), SCENE)
    model.vision_tower.stem.conv_bias = bias
    assert ask((model, processor), SCENE) == before
    assert work.count("encode") == 3


def test_an_image_that_overflows_is_not_kept(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load(checkpoint)
    model.image_cache = ImageCache(directory=tmp_path)
    model.vision_tower.stem.conv_bias = mx.full((8,), mx.inf)
    for _ in range(2):
        with pytest.raises(ModelError, match="image tower overflowed"):
            ask((model, processor), SCENE)
    assert not list(tmp_path.iterdir())


def test_a_directory_serves_the_next_run(
    checkpoint: Path, work: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(**options: Any) -> list[int]:
        model, processor = load(checkpoint, **options)
        model.image_cache = ImageCache(directory=tmp_path / "kept")
        return ask((model, processor), SCENE)

    first = answer()
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert answer() == first and work == ["pixels", "encode"]
    answer(dtype="float16")  # other weights
    assert work == ["pixels", "encode"] * 2
    monkeypatch.setattr("mlx_fastvlm.image_cache.__version__", "9")
    assert answer() == first
    assert work == ["pixels", "encode"] * 3


def _flip(data: bytearray) -> None:
    data[disk_cache.DIGEST_BYTES + 8] ^= 1


@pytest.mark.parametrize(
    "damage", [_flip, bytearray.clear, lambda d: d.pop(), lambda d: d.append(0)]
)
def test_a_damaged_entry_is_computed_again_and_mended(
    damage: Any, tiny: tuple[FastVLM, Processor], work: list[str], tmp_path: Path
) -> None:
    def answer() -> list[int]:
        tiny[0].image_cache = ImageCache(directory=tmp_path)
        return ask(tiny, SCENE)

    first = answer()
    (entry,) = tmp_path.iterdir()
    data = bytearray(entry.read_bytes())
    damage(data)
    entry.write_bytes(data)
    assert answer() == first and work.count("encode") == 2
    assert answer() == first and work.count("encode") == 2


def test_a_sound_entry_of_another_width_is_not_used(
    tiny: tuple[FastVLM, Processor], work: list[str], tmp_path: Path
) -> None:
    model, _ = tiny
    model.image_cache = ImageCache(directory=tmp_path)
    first = ask(tiny, SCENE)
    (entry,) = tmp_path.iterdir()
    disk_cache.DiskCache(tmp_path).write(entry.stem, np.ones((16, 8), np.float32))
    model.image_cache = ImageCache(directory=tmp_path)
    assert ask(tiny, SCENE) == first and work.count("encode") == 2


def test_a_directory_that_cannot_be_written_is_no_error(
    tiny: tuple[FastVLM, Processor], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    expected = ask(tiny, SCENE)
    tiny[0].image_cache = ImageCache(directory=tmp_path / "file" / "below")
    assert ask(tiny, SCENE) == expected
