"""Images are encoded once, and cached embeddings are never stale or wrong."""

import copy
import io
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
from PIL import Image

from mlx_fastvlm import FastVLM, ImageCache, ModelError, Processor, generate, load
from mlx_fastvlm.generation import image_cache
from mlx_fastvlm.generation.image_cache import image_weights
from mlx_fastvlm.preprocess.processor import Picture
from mlx_mobileclip.caching import disk_cache

SCENE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2")


@pytest.fixture
def tiny(checkpoint: Path) -> tuple[FastVLM, Processor]:
    return load(checkpoint)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record "pixels" for each image that is resized and "encode" for each encoded."""
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


def test_second_question_neither_resizes_nor_encodes(
    tiny: tuple[FastVLM, Processor], calls: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(png(SCENE))
    first = generate(*tiny, "the", path, max_tokens=4)
    assert calls == ["pixels", "encode"]
    again = generate(*tiny, "the", path.read_bytes(), max_tokens=4)
    assert again.token_ids == first.token_ids and again.stats.image_tokens == 16
    assert first.stats.vision_s > 0 == again.stats.vision_s
    assert generate(*tiny, "another", str(path), max_tokens=4).stats.image_tokens == 16
    assert calls == ["pixels", "encode"]
    ask(tiny, SCENE)  # an array's key is not that of the file
    ask(tiny, Image.fromarray(SCENE))
    assert calls == ["pixels", "encode"] * 2


def test_cached_embeddings_equal_computed_ones(tiny: tuple[FastVLM, Processor]) -> None:
    model, processor = tiny
    pixels = processor("the", SCENE).pixels
    assert pixels is not None
    cache = ImageCache()
    ask(tiny, SCENE, image_cache=cache)
    (picture,) = processor.prepare("the", SCENE)[1]
    cached = cache.get(model, image_weights(model), picture.key, 16)
    assert cached is not None and mx.array_equal(cached, model.encode_image(pixels)).item()


def test_other_content_size_or_mode_is_encoded_anew(
    tiny: tuple[FastVLM, Processor], calls: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(png(SCENE))
    ask(tiny, path)
    for options in ({"resolution": 128}, {"image_mode": "crop"}):
        ask(tiny, path, **options)
    path.write_bytes(png(255 - SCENE))  # same path, other content
    ask(tiny, path)
    ask(tiny, SCENE.reshape(40, 30, 3))
    ask(tiny, SCENE)  # the same bytes in another shape
    assert calls.count("encode") == 6


def test_repeated_image_in_a_prompt_is_encoded_once(
    tiny: tuple[FastVLM, Processor], calls: list[str]
) -> None:
    model, processor = tiny
    images = [SCENE, 255 - SCENE, SCENE]
    answer = ask(tiny, images)
    assert calls.count("encode") == 2
    inputs = processor("the", images)
    assert inputs.pixels is not None
    plain = model(inputs.input_ids[None], pixels=inputs.pixels)[0, -1, : processor.tokenizer.size]
    assert answer[0] == mx.argmax(plain).item()


def test_memory_is_bounded_by_max_bytes(tiny: tuple[FastVLM, Processor], calls: list[str]) -> None:
    images = [np.full((8, 8, 3), value, np.uint8) for value in range(3)]
    first = ImageCache()
    ask(tiny, images[0], image_cache=first)
    (one,) = first._entries.values()
    cache = ImageCache(max_bytes=2 * one.nbytes)
    calls.clear()
    for i in (0, 1, 0, 2):  # 1, least recently used, is dropped for 2
        ask(tiny, images[i], image_cache=cache)
    assert calls.count("encode") == 3
    ask(tiny, images[0], image_cache=cache)
    assert calls.count("encode") == 3
    ask(tiny, images[1], image_cache=cache)
    assert calls.count("encode") == 4
    assert sum(entry.nbytes for entry in cache._entries.values()) == 2 * one.nbytes
    nothing = ImageCache(max_bytes=0)
    ask(tiny, images[0], image_cache=nothing)
    ask(tiny, images[0], image_cache=nothing)
    assert calls.count("encode") == 6


def test_changed_weights_invalidate_entries(checkpoint: Path, calls: list[str]) -> None:
    model, processor = load(checkpoint)
    before = ask((model, processor), SCENE)
    bias = model.vision_tower.stem.conv_bias
    model.vision_tower.stem.conv_bias = bias + 5
    ask((model, processor), SCENE)
    model.vision_tower.stem.conv_bias = bias
    assert ask((model, processor), SCENE) == before
    assert calls.count("encode") == 3


def test_overflowing_embeddings_are_not_cached(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load(checkpoint)
    model.vision_tower.stem.conv_bias = mx.full((8,), mx.inf)
    for _ in range(2):
        with pytest.raises(ModelError, match="image tower overflowed"):
            ask((model, processor), SCENE, image_cache=ImageCache(directory=tmp_path))
    assert not list(tmp_path.iterdir())


def test_directory_serves_the_next_run(
    checkpoint: Path, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(**options: Any) -> list[int]:
        cache = ImageCache(directory=tmp_path / "cached")
        return ask(load(checkpoint, **options), SCENE, image_cache=cache)

    first = answer()
    assert len(list((tmp_path / "cached").iterdir())) == 1
    assert answer() == first and calls == ["pixels", "encode"]
    answer(dtype="float16")  # other weights
    assert calls == ["pixels", "encode"] * 2
    monkeypatch.setattr("mlx_fastvlm.generation.image_cache.__version__", "9")
    assert answer() == first
    assert calls == ["pixels", "encode"] * 3


def _flip(data: bytearray) -> None:
    data[disk_cache.DIGEST_BYTES + 8] ^= 1


@pytest.mark.parametrize(
    "damage", [_flip, bytearray.clear, lambda d: d.pop(), lambda d: d.append(0)]
)
def test_damaged_entry_is_recomputed_and_replaced(
    damage: Any, tiny: tuple[FastVLM, Processor], calls: list[str], tmp_path: Path
) -> None:
    def answer() -> list[int]:
        return ask(tiny, SCENE, image_cache=ImageCache(directory=tmp_path))

    first = answer()
    (entry,) = tmp_path.iterdir()
    data = bytearray(entry.read_bytes())
    damage(data)
    entry.write_bytes(data)
    assert answer() == first and calls.count("encode") == 2
    assert answer() == first and calls.count("encode") == 2


def test_entry_of_another_width_is_not_used(
    tiny: tuple[FastVLM, Processor], calls: list[str], tmp_path: Path
) -> None:
    first = ask(tiny, SCENE, image_cache=ImageCache(directory=tmp_path))
    (entry,) = tmp_path.iterdir()
    disk_cache.DiskCache(tmp_path).write(entry.stem, np.ones((16, 8), np.float32))
    again = ask(tiny, SCENE, image_cache=ImageCache(directory=tmp_path))
    assert again == first and calls.count("encode") == 2


def test_unwritable_directory_is_ignored(tiny: tuple[FastVLM, Processor], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expected = ask(tiny, SCENE)
    cache = ImageCache(directory=tmp_path / "file" / "below")
    assert ask(tiny, SCENE, image_cache=cache) == expected


def test_default_cache_of_a_model_is_freed_with_it(checkpoint: Path, calls: list[str]) -> None:
    models = [load(checkpoint), load(checkpoint)]
    for _ in range(3):
        for model in models:
            ask(model, SCENE)
    assert calls.count("encode") == 2
    before = len(image_cache._default_caches)
    del model, models
    assert len(image_cache._default_caches) == before - 2


@pytest.mark.parametrize("on_disk", [False, True])
def test_shared_cache_does_not_mix_models(checkpoint: Path, tmp_path: Path, on_disk: bool) -> None:
    """Two models with different towers answer as they do alone, in turns and in threads."""
    pair = [load(checkpoint), load(checkpoint)]
    other = pair[1][0].vision_tower.stem
    other.conv_bias = mx.array(np.linspace(-3, 3, 8, dtype=np.float32))
    alone = [ask(each, SCENE) for each in pair]
    cache = ImageCache(directory=tmp_path if on_disk else None)
    for _ in range(3):
        assert [ask(each, SCENE, image_cache=cache) for each in pair] == alone
    with ThreadPoolExecutor(4) as pool:
        turns = [i % 2 for i in range(24)]
        found = pool.map(lambda i: ask(pair[i], SCENE, image_cache=cache), turns)
        assert list(found) == [alone[i] for i in turns]
    afresh = ImageCache(directory=tmp_path if on_disk else None)
    assert [ask(each, SCENE, image_cache=afresh) for each in pair] == alone


def test_embeddings_of_old_weights_are_not_cached(tiny: tuple[FastVLM, Processor]) -> None:
    """An answer begins before the weights change, and ends after another has begun."""
    model, _ = tiny
    cache, before = ImageCache(), image_weights(model)
    assert cache.get(model, before, "key", 16) is None
    model.vision_tower.stem.conv_bias = model.vision_tower.stem.conv_bias + 1
    after = image_weights(model)
    assert cache.get(model, after, "key", 16) is None
    cache.put(model, before, "key", mx.zeros((1, 16, 8)))
    assert cache.get(model, after, "key", 16) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update({"projector": [{"bias": m.projector[0].bias + 1}]}),
        lambda m: m.load_weights([("projector.1.bias", m.projector[1].bias * 2)], strict=False),
        lambda m: m.apply(lambda w: w * 1.5 if w.dtype == mx.float32 else w),
        lambda m: m.set_dtype(mx.bfloat16),
        lambda m: setattr(m.vision_tower.stages[0].blocks[0].mlp.fc1, "bias", mx.ones((24,))),
        lambda m: setattr(m, "projector", m.projector[::-1]),
    ],
)
def test_every_way_to_change_weights_is_detected(
    change: Any, tiny: tuple[FastVLM, Processor], calls: list[str]
) -> None:
    ask(tiny, SCENE)
    before = image_weights(tiny[0])
    change(tiny[0])
    assert not before.same_as(image_weights(tiny[0]))


def test_model_can_be_copied_and_pickled(tiny: tuple[FastVLM, Processor]) -> None:
    model, processor = tiny
    expected = ask(tiny, SCENE)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert ask((twin, processor), SCENE) == expected
        twin.vision_tower.stem.conv_bias = twin.vision_tower.stem.conv_bias + 5
        assert ask((model, processor), SCENE) == expected
