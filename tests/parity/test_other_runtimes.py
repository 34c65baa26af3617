"""Checkpoints of `convert --layout`, loaded by the runtimes that they are written for."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import transformers
from PIL import Image
from reference import torch
from tolerances import STAGE_FLOAT32, relative_error
from world import HELD_OUT, render, scene

from convert import __main__ as command
from mlx_fastvlm import generate, load
from mlx_fastvlm.checkpoints.image_fields import image_settings
from mlx_mobileclip.json_fields import Fields
from mlx_mobileclip.preprocess.image import resize_crop, resize_pad, to_array

pytestmark = pytest.mark.parity
QUESTION = "How many shapes are there?"
# In a subprocess, where transformers must not find PyTorch; mlx-vlm's patches stay there.
MLX_VLM = """
import json, sys
sys.modules |= dict.fromkeys(("torch", "torchvision"))
import mlx.core as mx, numpy as np
from pathlib import Path
from mlx_vlm.models.fastvlm import VisionConfig
source, inputs, output, image, question = sys.argv[1:]
# mlx-vlm's tower has the published size whatever config.json says.
shape = json.loads((Path(source) / "config.json").read_text())["vision_config"]
for name in ("layers", "embed_dims", "mlp_ratios"):
    setattr(VisionConfig, name, shape[name])
from mlx_vlm import generate, load
from mlx_vlm.prompt_utils import apply_chat_template
model, processor = load(source)
given = np.load(inputs)
ids, pixels = mx.array(given["ids"]), mx.array(given["pixels"])
np.savez(output, np.array(model(ids, pixels, mx.ones(ids.shape, mx.int32)).logits))
prompt = apply_chat_template(processor, model.config, question, num_images=1)
print(generate(model, processor, prompt, image=[image], max_tokens=60, temperature=0.0).text)
"""


def convert(target: Path, *options: str) -> None:
    base = ["--model", "demo", "--mlx-path", str(target), "--dtype", "float32", "--verify"]
    assert command.main([*base, *options]) == 0


def test_transformers_gives_the_same_answer(tmp_path: Path) -> None:
    """The same pixels, prompt, logits and answer."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    convert(tmp_path / "there", "--layout", "transformers")
    model, processor = load("demo", dtype="float32")
    image = render(scene(HELD_OUT))
    inputs = processor(QUESTION, image)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "there").eval()
    prepare = AutoProcessor.from_pretrained(tmp_path / "there")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = prepare.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    given = prepare(images=image, text=text, return_tensors="pt")
    ids = np.array(inputs.input_ids)
    assert (
        given["input_ids"][0].tolist() == np.where(ids < 0, processor.tokenizer.size, ids).tolist()
    )
    assert inputs.pixels is not None
    # torchvision, the default, rounds elsewhere than Pillow: a few values differ by a level or two.
    resize = AutoImageProcessor.from_pretrained(tmp_path / "there", backend="pil")
    exact = resize(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    assert np.array_equal(exact, np.array(inputs.pixels))
    pixels = given["pixel_values"].permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        expected = theirs(**given).logits[0, :, : processor.tokenizer.size].numpy()
        generated = theirs.generate(**given, max_new_tokens=24, do_sample=False)[0, len(ids) :]
    ours = model(inputs.input_ids[None], pixels=mx.array(pixels))[0, :, : processor.tokenizer.size]
    assert relative_error(ours, expected) < STAGE_FLOAT32
    answer = generate(model, processor, QUESTION, image, max_tokens=24)
    assert answer.finish_reason == "stop"
    assert generated.tolist() == [*answer.token_ids, processor.tokenizer.added["<|im_end|>"]]
    assert prepare.decode(generated, skip_special_tokens=True) == answer.text


@pytest.mark.parametrize("question", ["Describe the image.", "What colour is the background?"])
def test_transformers_ends_its_answers(question: str, tmp_path: Path) -> None:
    """The directory's files suffice, even without generation_config.json."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    convert(tmp_path / "there", "--layout", "transformers")
    model, processor = load("demo", dtype="float32")
    image = render(scene(HELD_OUT + 1))
    expected = generate(model, processor, question, image, max_tokens=60)
    assert expected.finish_reason == "stop"
    prepare = AutoProcessor.from_pretrained(tmp_path / "there")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = prepare.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    given = prepare(images=image, text=text, return_tensors="pt")
    for _ in range(2):
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "there").eval()
        with torch.no_grad():
            generated = theirs.generate(**given, max_new_tokens=60)[
                0, given["input_ids"].shape[1] :
            ]
        assert prepare.decode(generated, skip_special_tokens=True) == expected.text
        (tmp_path / "there" / "generation_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "LlavaImageProcessor"])
@pytest.mark.parametrize("do_pad", [False, True])
@pytest.mark.parametrize("size", [(300, 201), (97, 500), (1023, 1025)])
def test_pixels_of_the_torchvision_processors(
    kind: str, do_pad: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    """Noise is the worst case: torchvision's rounding differs by 2 levels at most."""
    identity = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    crop = {"height": 256, "width": 256}
    theirs = getattr(transformers, kind)(
        size={"shortest_edge": 256}, crop_size=crop, do_pad=do_pad, **identity
    )
    theirs.save_pretrained(tmp_path)
    side, mode = image_settings(Fields({"model_type": "fast_vlm"}, "config"), tmp_path, 64)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    resize = {"pad": resize_pad, "crop": resize_crop}[mode]
    ours = to_array(resize(image, side)).transpose(2, 0, 1)
    pixels = theirs(image, return_tensors="np")["pixel_values"][0]
    levels = np.rint(np.abs(ours - pixels) * 255)
    assert levels.max() <= 2 and (levels > 0).mean() < 0.01


@pytest.mark.parametrize("options", [(), ("-q", "--q-mixed")], ids=["float", "mixed"])
def test_mlx_vlm_gives_the_same_answer(options: tuple[str, ...], tmp_path: Path) -> None:
    """The same logits of the same pixels and prompt, and the same whole answer."""
    if any(importlib.util.find_spec(name) is None for name in ("mlx_vlm", "requests")):
        pytest.skip("not installed: pip install --no-deps mlx-vlm; pip install requests")
    convert(tmp_path / "there", "--layout", "mlx-vlm", *options)
    model, processor = load(tmp_path / "there", dtype="float32")
    image = render(scene(HELD_OUT))
    image.save(tmp_path / "image.png")
    inputs = processor(QUESTION, image)
    ids, side = np.array(inputs.input_ids), processor.image_size
    first, last = np.flatnonzero(ids < 0)[[0, -1]]
    short = np.concatenate([ids[:first], [-200], ids[last + 1 :]])  # mlx-vlm has one id per image
    assert inputs.pixels is not None and side == 384
    pixels = np.array(inputs.pixels).transpose(0, 3, 1, 2)
    np.savez(tmp_path / "inputs.npz", ids=short[None], pixels=pixels)
    paths = (tmp_path / name for name in ("there", "inputs.npz", "output.npz", "image.png"))
    command_line = [sys.executable, "-c", MLX_VLM, *map(str, paths), QUESTION]
    process = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    theirs = np.load(tmp_path / "output.npz")["arr_0"][0]
    ours = np.array(model(inputs.input_ids[None], pixels=inputs.pixels))[0]
    assert relative_error(ours, theirs) < STAGE_FLOAT32
    answer = generate(model, processor, QUESTION, image, max_tokens=60)
    assert answer.finish_reason == "stop"
    assert process.stdout.splitlines()[-1] == answer.text


def test_chat_template_renders_the_same_prompt(tmp_path: Path) -> None:
    """The chat template gives the ids of our processor."""
    from transformers import AutoTokenizer

    _, processor = load("demo")
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "How many?"},
    ]
    for target in ("transformers", "mlx-vlm"):
        convert(tmp_path / target, "--layout", target)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / target)
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(theirs, add_special_tokens=False)["input_ids"]
        assert ids == np.array(processor(messages).input_ids).tolist()
        assert json.loads((tmp_path / target / "config.json").read_text())["model_type"]
