"""Properties that hold for any input, checked on random ones."""

import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tolerances import BATCHED, REUSED, relative_error

from mlx_fastvlm import ConfigError, ModelError, Processor, load
from mlx_fastvlm.checkpoints.fastvlm import read_foreign
from mlx_fastvlm.models.config import FastVLMConfig
from mlx_fastvlm.models.fastvlm import IMAGE_TOKEN, FastVLM
from mlx_fastvlm.preprocess.tokenizer import TextDecoder, Tokenizer
from mlx_mobileclip.checkpoints.hub import Checkpoint
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.preprocess.image import MAX_IMAGE_SIDE, resize_crop, resize_pad, to_array

TOKENS_PER_IMAGE = 16  # (256 / 64)^2

# The same examples every time, without deadlines, as machines differ.
few = settings(max_examples=8, deadline=None, derandomize=True)
many = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_layout(tmp_path_factory.mktemp("model") / "sound", "llava_qwen2")


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[FastVLM, Processor]:
    return load(directory, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[FastVLM, Processor]) -> Tokenizer:
    return loaded[1].tokenizer


# Prompt and images

parts = st.lists(st.one_of(st.text(max_size=12), st.integers(0, 255)), max_size=4)


def message(content: list[str | int]) -> list[dict[str, Any]]:
    """A user's message of texts, and of images of one brightness each."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "image": np.full((3, 5, 3), part, np.uint8)}
                for part in content
            ],
        }
    ]


@few
@given(content=parts)
def test_one_id_per_embedding(loaded: Any, content: list[str | int]) -> None:
    """Ids, embedding rows and cache entries have one length for any mix of text and images."""
    model, processor = loaded
    inputs = processor(message(content))
    images = sum(isinstance(part, int) for part in content)
    ids = np.array(inputs.input_ids)
    assert np.count_nonzero(ids == IMAGE_TOKEN) == TOKENS_PER_IMAGE * images
    assert (inputs.pixels is None) == (images == 0)
    features = None if inputs.pixels is None else model.encode_image(inputs.pixels)
    embeddings = model.embed(inputs.input_ids[None], features)
    assert embeddings.shape == (1, len(ids), 64)
    cache = model.make_cache()
    logits = model(inputs.input_ids[None], cache, embeddings)
    assert logits.shape[:2] == (1, len(ids))
    assert all(layer.offset == len(ids) for layer in cache)


@settings(few, max_examples=4)
@given(values=st.lists(st.integers(0, 255), min_size=2, max_size=3), data=st.data())
def test_images_keep_their_order(loaded: Any, values: list[int], data: st.DataObject) -> None:
    """Permuting the images permutes their embeddings and nothing else."""
    model, processor = loaded
    order = data.draw(st.permutations(range(len(values))))
    content = [part for value in values for part in ("a", value)]
    swapped = [part for i in order for part in ("a", values[i])]

    def rows(content: list[str | int]) -> tuple[mx.array, list[int]]:
        inputs = processor(message(content))
        # Scaled up, as random weights hardly distinguish values up to 1.
        features = model.encode_image(10_000 * inputs.pixels)
        embeddings = model.embed(inputs.input_ids[None], features)[0]
        positions = np.flatnonzero(np.array(inputs.input_ids) == IMAGE_TOKEN)
        found = embeddings[mx.array(positions)]
        return found.reshape(len(values), TOKENS_PER_IMAGE, -1), positions.tolist()

    (before, positions), (after, same_positions) = rows(content), rows(swapped)
    assert positions == same_positions
    assert relative_error(after, before[mx.array(order)]) < BATCHED
    for i, j in itertools.combinations(range(len(values)), 2):
        differ = relative_error(before[i], before[j]) > 100 * BATCHED
        assert differ == (values[i] != values[j])


# The KV cache


@few
@given(
    ids=st.lists(st.integers(0, 266), min_size=2, max_size=40),
    trimmed=st.integers(0, 300),
    data=st.data(),
)
def test_prefill_can_be_split_anywhere(
    loaded: Any, ids: list[int], trimmed: int, data: st.DataObject
) -> None:
    """Two passes equal one, also after trimming tokens and growing the cache."""
    model, _ = loaded
    k = data.draw(st.integers(1, len(ids) - 1))
    whole = model(mx.array([ids]), model.make_cache())
    cache = model.make_cache(1)
    first = model(mx.array([ids[:k]]), cache)
    if trimmed:
        model(mx.array([[7] * trimmed]), cache)
        assert all(layer.trim(trimmed) == trimmed for layer in cache)
    second = model(mx.array([ids[k:]]), cache)
    assert all(layer.offset == len(ids) for layer in cache)
    halves = mx.concatenate([first, second], axis=1)
    assert relative_error(halves, whole) < REUSED


# Configs

hostile_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 600),
    st.floats(),
    st.sampled_from([1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**30, -1, 0, 65536, 65537, 1e308]),
    st.text(max_size=5),
    st.lists(st.integers(-1, 70), max_size=6),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += leaves(value, (*path, key))
    return found


def replaced(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


@many
@given(value=hostile_values, data=st.data())
def test_any_canonical_config_is_accepted_or_refused_by_name(
    loaded: Any, value: Any, data: st.DataObject
) -> None:
    """The model is built lazily, as by the loader, which must not allocate memory."""
    good = loaded[0].config.to_json()
    path = data.draw(st.sampled_from(leaves(good)))
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    try:
        config = FastVLMConfig.from_json(replaced(good, path, value), "config.json")
        named_parameters(FastVLM(config))
    except ConfigError as error:
        assert path[0] in str(error)
    assert mx.get_peak_memory() - held < 50 << 20


@many
@given(value=hostile_values, which=st.sampled_from(["apple", "transformers"]), data=st.data())
def test_any_source_config_is_accepted_or_refused(
    directory: Path, value: Any, which: str, data: st.DataObject
) -> None:
    good = getattr(synthetic, f"{which}_config")()
    extra = ("rope_scaling", "quantization", "text_config", "mm_projector_type")
    path = data.draw(st.sampled_from([*leaves(good), *((key,) for key in extra)]))
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    try:
        read_foreign(Checkpoint(directory, "case"), replaced(good, path, value))
    except ModelError as error:
        assert str(error).isprintable()
    assert mx.get_peak_memory() - held < 50 << 20


# Text

tricky = "then in\n\r\t '\u0301\u212b漢👨\u200d🦰1a.<|_>"
texts = st.one_of(st.text(), st.text(alphabet=tricky, max_size=40))


@many
@given(text=texts)
def test_decoded_text_is_in_nfc(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@many
@given(ids=st.lists(st.integers(-3, 300), max_size=30))
def test_streamed_text_equals_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """For any ids, including incomplete characters and control tokens."""
    data = b"".join(tokenizer.token_bytes(i) for i in ids)
    decoder = TextDecoder(tokenizer)
    streamed = "".join(decoder.feed(i) for i in ids) + decoder.finish()
    assert streamed == tokenizer.decode(ids) == data.decode("utf-8", errors="replace")


@many
@given(pieces=st.lists(texts, min_size=1, max_size=3))
def test_streamed_text_is_always_a_prefix(tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = unicodedata.normalize("NFC", "".join(pieces))
    decoder, streamed = TextDecoder(tokenizer), ""
    for i in tokenizer.encode(text):
        streamed += decoder.feed(i)
        assert text.startswith(streamed)
    assert streamed + decoder.finish() == text


# Preprocessing

sides = st.one_of(st.integers(1, 40), st.integers(1, 700))


def noise(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@many
@given(width=sides, height=sides, size=st.sampled_from([16, 64, 256]), seed=st.integers(0, 9))
def test_padding_equals_the_reference(width: int, height: int, size: int, seed: int) -> None:
    """Bit for bit: apple/ml-fastvlm 592b4ad expand2square, then a bicubic resize."""
    image = noise(width, height, seed)
    side = max(width, height)
    square = Image.new("RGB", (side, side), (0, 0, 0))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    expected = square.resize((size, size), Image.Resampling.BICUBIC)
    assert resize_pad(image, size).tobytes() == expected.tobytes()


@many
@given(width=sides, height=sides, size=st.sampled_from([16, 64]), seed=st.integers(0, 9))
def test_pixels_are_bounded(width: int, height: int, size: int, seed: int) -> None:
    """Cropping an image of one colour keeps the colour."""
    assume(max(width, height) * size // min(width, height) <= MAX_IMAGE_SIDE)
    image = noise(width, height, seed)
    for resize in (resize_pad, resize_crop):
        pixels = to_array(resize(image, size))
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.float32
        assert 0 <= pixels.min() <= pixels.max() <= 1
    plain = Image.new("RGB", (width, height), (seed, 250, 3))
    assert np.all(np.asarray(resize_crop(plain, size)) == (seed, 250, 3))
