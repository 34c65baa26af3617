"""Quantised layers: every mode, in memory and on disk, and back to floats."""

import itertools
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
import synthetic_clip
from synthetic_clip import tiny_config, tiny_shapes, values
from tolerances import relative_error

import mlx_fastvlm
import mlx_mobileclip
from convert import __main__ as command
from convert.calibration import calibration_samples, drawn_images
from convert.quantize.mixed import BITS, allocate_bits, group_by_module
from convert.quantize.quality import agreement
from convert.verify.stages import LOGITS, UNROUNDED, make_prompt, run_fastvlm
from mlx_fastvlm import ConfigError, Quantization
from mlx_fastvlm.loader import find_checkpoint, read_canonical
from mlx_fastvlm.models.fastvlm import PARTS as FASTVLM_PARTS
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.models.clip import PARTS as MOBILECLIP_PARTS
from mlx_mobileclip.models.variants import VARIANTS
from mlx_mobileclip.quantization import MODES, choose_layers, quantize_layers

EXAMPLES = Path(__file__).parents[2] / "examples"  # four pictures

QUANTIZATIONS = [
    Quantization(bits, group_size, mode)
    for mode, (all_bits, group_sizes) in MODES.items()
    for bits in all_bits
    for group_size in group_sizes
    if group_size <= 64  # the widest that divides the tiny decoder
]
# Products with quantised weights sum in another order than with the same weights as floats.
SUM_ORDER = 1e-4


@pytest.fixture(scope="module")
def fastvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_layout(tmp_path_factory.mktemp("vlm") / "source", "llava_qwen2")


def convert(source: Path, target: Path, *options: str) -> None:
    arguments = ["--model", str(source), "--mlx-path", str(target), "--dtype", "float32"]
    assert command.main([*arguments, "--verify", *options]) == 0


def q(quantization: Quantization, *parts: str) -> list[str]:
    result = ["-q", "--q-mode", quantization.mode, "--q-bits", str(quantization.bits)]
    return [*result, "--q-group-size", str(quantization.group_size), "--q-parts", *parts]


def answer(path: Path, **options: Any) -> mx.array:
    model, processor = mlx_fastvlm.load(path, dtype="float32", **options)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    inputs = processor("what is it?", [image], resolution=128)
    return model(inputs.input_ids[None], pixels=inputs.pixels)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_fastvlm_on_disk_and_in_memory(
    quantization: Quantization, fastvlm: Path, tmp_path: Path
) -> None:
    """Quantising on disk and in memory give the same, which equals dequantised floats."""
    convert(fastvlm, tmp_path / "quantized", *q(quantization, *FASTVLM_PARTS))
    logits = answer(tmp_path / "quantized")
    options = {"quantize": quantization, "parts": tuple(FASTVLM_PARTS)}
    assert mx.array_equal(logits, answer(fastvlm, **options)).item()
    convert(tmp_path / "quantized", tmp_path / "floats", "--dequantize")
    assert relative_error(logits, answer(tmp_path / "floats")) < SUM_ORDER
    assert relative_error(logits, answer(fastvlm)) > SUM_ORDER  # quantising loses precision


@pytest.mark.parametrize("part", FASTVLM_PARTS)
def test_each_part_of_fastvlm_is_quantized_alone(
    part: str, fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(fastvlm, tmp_path / "quantized", *q(Quantization(8, 32), part))
    model, _ = mlx_fastvlm.load(tmp_path / "quantized")
    quantized = {name.rpartition(".")[0] for name in named_parameters(model) if "scales" in name}
    assert quantized == model.config.quantization.keys()
    assert all(path.startswith(FASTVLM_PARTS[part]) for path in quantized)
    listed = (
        "not quantised, as the group size does not divide their width" in capsys.readouterr().err
    )
    assert listed == (part == "vision")


def test_dequantized_checkpoint_can_be_quantized_again(
    fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dequantised checkpoint has no `quantization`, and can be quantised again."""
    convert(fastvlm, tmp_path / "quantized", "-q", "--q-group-size", "32")
    convert(tmp_path / "quantized", tmp_path / "floats", "--dequantize")
    messages = capsys.readouterr().err
    for name in ("quantized", "floats"):
        count = len(read_canonical(find_checkpoint(tmp_path / name))[1])
        assert f"{count} tensors were read back and are identical bit by bit." in messages
    model, _ = mlx_fastvlm.load(tmp_path / "floats")
    assert not model.config.quantization
    convert(tmp_path / "floats", tmp_path / "again", "-q", "--q-group-size", "32")
    model, _ = mlx_fastvlm.load(tmp_path / "again")
    assert model.config.quantization


def test_quantization_block_of_config_json(fastvlm: Path, tmp_path: Path) -> None:
    """mlx-lm's form: layers may omit the defaults; earlier files have no defaults."""
    convert(fastvlm, tmp_path / "quantized", *q(Quantization(8, 32), "decoder"))
    path = tmp_path / "quantized" / "config.json"
    config = json.loads(path.read_text())
    expected = answer(tmp_path / "quantized")
    defaults = {"bits": 8, "group_size": 32, "mode": "affine"}
    layers = {name: v for name, v in config["quantization"].items() if name not in defaults}
    assert config["quantization"] == defaults | dict.fromkeys(layers, defaults)
    for entry in (layers, defaults | {name: {} for name in layers}):
        path.write_text(json.dumps(config | {"quantization": entry}))
        assert mx.array_equal(answer(tmp_path / "quantized"), expected).item()


def test_unsupported_quantization_is_refused(fastvlm: Path, tmp_path: Path) -> None:
    four = Quantization(4, 32)
    with pytest.raises(ConfigError, match="no part is called 'text'; there are decoder"):
        mlx_fastvlm.load(fastvlm, quantize=four, parts=("text",))
    with pytest.raises(ConfigError, match="no layer of decoder is a multiple of 128 wide"):
        mlx_fastvlm.load(fastvlm, quantize=Quantization(4, 128))
    with pytest.raises(ConfigError, match="nvfp5"):
        Quantization.of("nvfp5")
    convert(fastvlm, tmp_path / "quantized", *q(four, "decoder"))
    with pytest.raises(ConfigError, match="quantised already"):
        mlx_fastvlm.load(tmp_path / "quantized", quantize=four)


@pytest.mark.parametrize("variant", ["MobileCLIP-S0", "MobileCLIP2-S3", "MobileCLIP2-B"])
@pytest.mark.parametrize("parts", [("image",), ("text",), tuple(MOBILECLIP_PARTS)], ids=str)
def test_mobileclip_on_disk_and_in_memory(
    variant: str, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {name: tiny_config(name) for name in VARIANTS}
    monkeypatch.setattr(mobileclip, "VARIANTS", small)
    source = tmp_path / f"{variant.lower().replace('-', '_')}.pt"
    layout = "apple" if variant == "MobileCLIP-S0" else "open_clip"
    synthetic_clip.write(source, values(tiny_shapes(variant, layout)))
    quantization = Quantization(8, 32)
    convert(source, tmp_path / "quantized", *q(quantization, *parts))
    convert(tmp_path / "quantized", tmp_path / "floats", "--dequantize")

    def embeddings(path: Path, **options: Any) -> tuple[mx.array, mx.array]:
        model, processor = mlx_mobileclip.load(path, dtype="float32", **options)
        image = np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)
        pixels, ids = processor.images([image]), processor.texts(["a red circle"])
        return model.encode_image(pixels), model.encode_text(ids)

    floats = embeddings(tmp_path / "floats")
    for name, quantized, dequantized, loaded, original in zip(
        MOBILECLIP_PARTS,
        embeddings(tmp_path / "quantized"),
        floats,
        embeddings(source, quantize=quantization, parts=parts),
        embeddings(source),
        strict=True,
    ):
        assert mx.array_equal(quantized, loaded).item()
        assert relative_error(quantized, dequantized) < SUM_ORDER
        assert (relative_error(quantized, original) > 1e-6) == (name in parts)


def test_calibration_with_pictures_of_the_user(
    fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of a directory replace the drawn ones; without any, nothing is written."""
    options = ["-q", "--q-group-size", "32", "--calibration", str(tmp_path / "pictures")]
    base = ["--model", str(fastvlm), "--mlx-path", str(tmp_path / "quantized")]
    assert command.main([*base, *options]) == 1
    assert "is not a directory; give one of images" in capsys.readouterr().err
    (tmp_path / "pictures").mkdir()
    assert command.main([*base, *options]) == 1
    assert "contains no image" in capsys.readouterr().err
    assert not (tmp_path / "quantized").exists()
    drawn_images(1)[0].save(tmp_path / "pictures" / "one.png")
    assert command.main([*base, *options]) == 0
    one = capsys.readouterr().err
    assert command.main([*base[:3], str(tmp_path / "drawn"), *options[:3]]) == 0
    eight = capsys.readouterr().err
    few, many = (int(re.findall(r"mean of (\d+) tokens", text)[0]) for text in (one, eight))
    assert 0 < few < many
    card = (tmp_path / "quantized" / "README.md").read_text()
    assert "KL divergence" in card and "python -m convert --model" in card


def test_reported_divergence_grows_with_fewer_bits(fastvlm: Path, tmp_path: Path) -> None:
    """Fewer bits diverge more; the original does not diverge from itself."""
    found = []
    for bits in (8, 4, 2):
        convert(fastvlm, tmp_path / str(bits), *q(Quantization(bits, 32), "decoder"))
        card = (tmp_path / str(bits) / "README.md").read_text()
        found.append(float(re.findall(r"\| ([\d.e-]+) nats", card)[0]))
    assert 0 < found[0] < found[1] < found[2]
    model, processor = mlx_fastvlm.load(fastvlm)
    checkpoint = find_checkpoint(fastvlm)

    def read() -> Any:
        return read_canonical(checkpoint)

    samples = calibration_samples(None)
    run_stages = partial(run_fastvlm, processor=processor)
    same = agreement(run_stages, read, read, samples)
    assert (same.kl, same.top_1) == (0.0, 1.0)
    first = make_prompt(processor, samples[0])
    logs = next(out.value for out in run_stages(read, {}, samples) if out.stage == LOGITS)
    logits = model(first.ids, pixels=first.pixels)[0, first.start :, : processor.tokenizer.size]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert relative_error(logs, expected) < 1e-5  # stage by stage as in one pass


@pytest.mark.parametrize("tied", [True, False])
def test_each_unit_quantized_alone(tied: bool, tmp_path: Path) -> None:
    """Stages with one unit rounded equal a model with that unit quantised."""
    tensors = synthetic.apple_tensors("tiny", lm_head="tied" if tied else "differs")
    config = synthetic.apple_config("tiny", tie_word_embeddings=tied)
    source = synthetic.write(tmp_path / "source", tensors, config)
    checkpoint, (model, processor) = find_checkpoint(source), mlx_fastvlm.load(source)
    quantized, _ = choose_layers(model, FASTVLM_PARTS, tuple(FASTVLM_PARTS), Quantization(2, 32))
    units = group_by_module(quantized)
    samples = calibration_samples(None)[:1]
    first = make_prompt(processor, samples[0])
    logs = {
        each.rounded: each.value
        for each in run_fastvlm(lambda: read_canonical(checkpoint), units, samples, processor)
        if each.stage == LOGITS
    }
    assert logs.keys() == {UNROUNDED, *units}
    for unit, layers in units.items():
        other, _ = mlx_fastvlm.load(source)
        quantize_layers(other, layers)
        logits = other(first.ids, pixels=first.pixels)[0, first.start :, : processor.tokenizer.size]
        expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        assert (
            relative_error(logs[unit], expected) < relative_error(logs[unit], logs[UNROUNDED]) / 5
        )


def test_bits_are_allocated_where_they_save_most() -> None:
    """The greedy choice is optimal: no other mixture of that size costs less."""
    costs, sizes = {"a": 1.0, "b": 0.1, "c": 0.5}, {"a": 640, "b": 640, "c": 1280}
    quantization = Quantization(2, 64)

    def stored(bits: int) -> float:
        return 16 if bits == 16 else bits + 0.5

    def price(bits: dict[str, int]) -> float:
        return sum(sizes[unit] * (stored(n) - stored(2)) for unit, n in bits.items())

    def cost(bits: dict[str, int]) -> float:
        return sum(costs[u] * (15 / (2**n - 1)) ** 2 for u, n in bits.items() if n != 16)

    for budget in (0, 640, 2560, 5000, 9000, 100_000):
        found = allocate_bits(costs, sizes, quantization, budget, mx.float16)
        spent = price(found)
        assert spent <= budget
        others = (dict(zip("abc", n, strict=True)) for n in itertools.product(BITS, repeat=3))
        assert cost(found) <= min(cost(bits) for bits in others if price(bits) <= spent) + 1e-12
    assert set(found.values()) == {16}  # everything fits in floats


def test_mixed_bits_diverge_less(fastvlm: Path, tmp_path: Path) -> None:
    """A mixture with slightly more bits diverges less than uniform quantisation."""
    sizes, kls = {}, {}
    for name, options in {
        "uniform": ["--q-bits", "3"],
        "mixed": ["--q-bits", "3", "--q-mixed"],
        "more": ["--q-bits", "4"],
    }.items():
        convert(fastvlm, tmp_path / name, "-q", "--q-group-size", "32", *options)
        card = (tmp_path / name / "README.md").read_text()
        kls[name] = float(re.findall(r"\| ([\d.e-]+) nats", card)[0])
        sizes[name] = int(re.findall(r"on disk \| ([\d,]+)", card)[0].replace(",", ""))
    assert sizes["uniform"] < sizes["mixed"] < sizes["more"]
    assert kls["mixed"] < kls["uniform"]
    model, _ = mlx_fastvlm.load(tmp_path / "mixed")
    assert len({quantization.bits for quantization in model.config.quantization.values()}) > 1


@pytest.mark.parametrize("share", [0.15, 0.25, 0.6, 2])
def test_max_size_is_kept(
    share: float, fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--max-size is kept, and nearly used up; too small a one is refused before any work."""
    plain = tmp_path / "plain"
    convert(fastvlm, plain)
    whole = sum(path.stat().st_size for path in plain.glob("*.safetensors"))
    limit = int(share * whole)
    target = tmp_path / "quantized"
    arguments = ["--model", str(fastvlm), "--mlx-path", str(target), "--dtype", "float32"]
    options = ["-q", "--q-group-size", "32", "--max-size", f"{limit / 1000}K"]
    options += ["--calibration", str(EXAMPLES)]
    status = command.main([*arguments, *options])
    if share < 0.2:
        assert status == 1
        assert re.search(r"the weights take \d+\.\d MB even at 2 bits", capsys.readouterr().err)
        assert not target.exists()
        return
    assert status == 0
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert min(0.8 * limit, 0.9 * whole) < size <= limit


def test_contradicting_options_are_refused(
    fastvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", str(fastvlm), "--mlx-path", str(tmp_path / "quantized")]
    for options, message in {
        ("--max-size", "4MB"): "need -q",
        ("--q-mixed",): "need -q",
        ("-q", "--max-size", "4 shoes"): "is not a size; write it like 400MB",
        ("-q", "--max-size", "4MB", "--q-mode", "mxfp4"): "mxfp4 has a fixed number of bits",
    }.items():
        assert command.main([*base, *options]) == 1
        assert message in capsys.readouterr().err
