"""Conversations in the forms of OpenAI, Ollama and transformers: no image or key is dropped."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from PIL import Image as PILImage

from mlx_fastvlm import ImageError, Processor, PromptError, load
from mlx_fastvlm.preprocess import chat_format
from mlx_fastvlm.preprocess.chat_format import render
from mlx_fastvlm.preprocess.messages import Image, read_messages


def png(value: int) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(np.full((8, 12, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


PNG = png(90)
BASE64 = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{BASE64}"
TEXT = {"type": "text", "text": "Q"}


def user(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", **fields}]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return load(synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2"))[1]


@pytest.mark.parametrize(
    "messages",
    [
        user(content="Q", images=[PNG]),
        user(content="Q", images=(PNG,)),
        user(content="Q", images=[BASE64]),  # Ollama
        user(content="Q", image=PNG),
        user(content=[TEXT], images=[URI]),
        user(content=[{"type": "image", "image": PNG}, TEXT]),
        user(content=[{"type": "image", "url": URI}, TEXT]),  # transformers
        user(content=[{"type": "image", "base64": BASE64}, TEXT]),
        user(content=[{"type": "image_url", "image_url": {"url": URI}}, TEXT]),  # OpenAI
        user(content=[{"type": "image_url", "image_url": {"url": URI, "detail": "auto"}}, TEXT]),
        user(content=[{"type": "image_url", "image_url": URI}, TEXT]),
    ],
)
def test_every_form_gives_the_same_prompt(messages: Any, processor: Processor) -> None:
    expected = processor("Q", [PNG])
    found = processor(messages)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.pixels is not None and (found.pixels == expected.pixels).all().item()


def test_paths_and_file_objects_are_read(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    expected = processor("Q", [PNG]).pixels
    for part in ({"path": str(path)}, {"url": str(path)}, {"image": path}):
        pixels = processor(user(content=[{"type": "image", **part}, TEXT])).pixels
        assert pixels is not None and (pixels == expected).all().item()
    file = io.BytesIO(PNG)
    for _ in range(2):  # read twice, as by two questions
        pixels = processor("Q", [file]).pixels
        assert pixels is not None and (pixels == expected).all().item()
    with path.open("rb") as opened:
        pixels = processor("Q", opened).pixels
    assert pixels is not None and (pixels == expected).all().item()


def test_images_keep_their_order() -> None:
    messages = [
        {"role": "user", "content": [TEXT, {"type": "image"}], "images": [b"1", b"2"]},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Q", "image": b"3"},
    ]
    sources = [part.source for part in render(messages, 1) if isinstance(part, Image)]
    assert sources == [b"1", b"2", None, b"3"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (user(content="Q", picture=PNG), "a message has the unknown key 'picture'"),
        (user(content="Q", name="me"), "'name'"),
        (
            user(content=[{"type": "text", "text": "Q", "image": PNG}]),
            "a text part has the unknown key",
        ),
        (
            user(content=[{"type": "image", "file": "a.jpg"}]),
            "an image part has the unknown key 'file'",
        ),
        (user(content=[{"type": "image", "detail": "low"}]), "'detail'"),
        (user(content=[{"type": "image", "path": "a", "url": "b"}]), "path and url; give one"),
        (user(content="Q", image=PNG, images=[PNG]), "both image and images"),
        (user(content="Q", images=PNG), "must be a list, not a bytes"),
        (
            user(content=[{"type": "image_url", "url": URI}]),
            "an image_url part has the unknown key 'url'",
        ),
        (user(content=[{"type": "image_url", "image_url": 7}]), "a data URI or a path"),
        (user(content=[{"type": "image_url"}]), "a data URI or a path"),
        (
            user(content=[{"type": "image_url", "image_url": {"url": URI, "detail": "low"}}]),
            "detail can only be auto",
        ),
        (
            user(content=[{"type": "image_url", "image_url": {"url": URI, "x": 1}}]),
            "the unknown key 'x'",
        ),
        (user(content=[{"type": "input_image", "image_url": URI}]), "a part must be"),
        (user(content=["Q"]), "a part must be"),
        (user(images=[PNG]), "content must be a text or a list of parts"),
    ],
)
def test_unknown_keys_and_forms_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(PromptError) as refused:
        read_messages(messages)
    assert message in str(refused.value)


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "file", "s3"])
@pytest.mark.parametrize(
    "part", [lambda u: {"type": "image", "url": u}, lambda u: {"type": "image", "path": u}]
)
def test_urls_are_never_fetched(part: Any, scheme: str, processor: Processor) -> None:
    with pytest.raises(ImageError, match="URLs are not opened"):
        processor(user(content=[part(f"{scheme}://localhost/a.png"), TEXT]))
    url = {"type": "image_url", "image_url": {"url": f"{scheme}://localhost/a.png"}}
    with pytest.raises(ImageError, match="URLs are not opened"):
        processor(user(content=[url, TEXT]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png,abc", "not a data URI in base64"),
        ("data:,", "not a data URI in base64"),
        ("DATA:image/png;BASE64," + base64.b64encode(b"no image").decode(), "not an image"),
        (io.StringIO("text"), "binary mode"),
        (object(), "cannot be a object"),
    ],
)
def test_bad_images_are_refused(image: Any, message: str, processor: Processor) -> None:
    with pytest.raises(ImageError, match=message):
        _ = processor("Q", [image]).pixels


@pytest.mark.parametrize(
    "text", ["<image>\nWhat is this?", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"]
)
def test_text_that_looks_rendered_warns_once(
    text: str, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_format, "_warned", set())
    with pytest.warns(UserWarning, match="which is read as plain text") as caught:
        processor(text)
        processor(text)
    assert len(caught) == 1
