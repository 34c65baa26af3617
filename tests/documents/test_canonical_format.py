"""docs/canonical-format.md has every field and every tensor, and no others.

Its expressions are evaluated: they must make the names and shapes of all published models.
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from markdown_file import ROOT, Document, Section, code_spans
from safetensors import safe_open

from convert import convert
from mlx_fastvlm import FastVLM
from mlx_fastvlm.models.config import FORMAT_VERSION, FastVLMConfig, projector_depth
from mlx_mobileclip import MobileCLIP, MobileCLIPConfig, Quantization
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.json_fields import Fields, read_json
from mlx_mobileclip.models import clip
from mlx_mobileclip.models.fastvit import PRESETS
from mlx_mobileclip.models.variants import VARIANTS
from mlx_mobileclip.quantization import MODES, read_quantized_layers

PAGE = Document("docs/canonical-format.md")
DEMOS = {kind: ROOT / f"mlx_{kind}" / "demo" for kind in ("fastvlm", "mobileclip")}
TYPES = {
    "integer": "integer",
    "number": "number",
    "boolean": "boolean",
    "string": "string",
    "choice": "string",
    "integers": "list of integers",
    "numbers": "list of numbers",
    "booleans": "list of booleans",
    "choices": "list of strings",
}


# The fields of config.json.


def fastvlm_values() -> dict[str, Any]:
    return read_json(DEMOS["fastvlm"] / "config.json")


def values_of(variant: str) -> dict[str, Any]:
    return json.loads(json.dumps(VARIANTS[variant].to_json()))


def requested(
    read: Callable[..., object], values: dict[str, Any]
) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    """Map object and field to the method of `Fields` that reads it, and its arguments."""
    found: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in TYPES:
            method = getattr(Fields, name)

            def record(
                self: Fields, *args: Any, name: str = name, method: Any = method, **options: Any
            ) -> Any:
                bound = inspect.signature(method).bind(self, *args, **options)
                bound.apply_defaults()
                where = self.where.rpartition(": ")[2]
                found.setdefault((where, bound.arguments["key"]), (name, bound.arguments))
                return method(self, *args, **options)

            patch.setattr(Fields, name, record)
        read(values, "config")
    return found


FIELDS = [  # section, reader, its values, the object in them
    ("config.json of FastVLM", FastVLMConfig, fastvlm_values, "config"),
    ("text_config of FastVLM", FastVLMConfig, fastvlm_values, "text_config"),
    ("FastViT configuration", FastVLMConfig, fastvlm_values, "vision_config"),
    ("config.json of MobileCLIP", MobileCLIPConfig, "MobileCLIP-S0", "config"),
    ("text_config of MobileCLIP", MobileCLIPConfig, "MobileCLIP-S0", "text_config"),
    ("preprocess_config", MobileCLIPConfig, "MobileCLIP-S0", "preprocess_config"),
    ("FastViT configuration", MobileCLIPConfig, "MobileCLIP-S0", "image_config"),
    ("ViT configuration", MobileCLIPConfig, "MobileCLIP-B", "image_config"),
]


@pytest.mark.parametrize(("title", "config", "source", "object_name"), FIELDS)
def test_config_fields_are_documented(
    title: str, config: Any, source: Any, object_name: str
) -> None:
    rows = {code_spans(row[0])[0]: row for row in PAGE[title].rows()}
    if object_name == "image_config":
        rows |= {code_spans(row[0])[0]: row for row in PAGE["image_config"].rows()}
    values = values_of(source) if isinstance(source, str) else source()
    written = values if object_name == "config" else values[object_name]
    reads = requested(config.from_json, values)
    fields_read = {key: call for (where, key), call in reads.items() if where == object_name}
    optional = {"quantization"} if object_name == "config" else set()
    assert rows.keys() == written.keys() | fields_read.keys() | optional
    for key, (method, arguments) in fields_read.items():
        _, kind, limits, default, _ = rows[key]
        assert kind == TYPES[method], key
        assert default == ("required" if arguments.get("default", ...) is ... else default), key
        if key == "format_version":
            assert limits == f"1 to {FORMAT_VERSION}" == f"1 to {clip.FORMAT_VERSION}"
        elif "low" in arguments:
            assert [float(n) for n in limits.split(" to ")] == [
                arguments["low"],
                arguments["high"],
            ], key
        elif "allowed" in arguments:
            assert tuple(code_spans(limits)) == arguments["allowed"], key


def test_projector_types_are_documented() -> None:
    row = next(row for row in PAGE["config.json of FastVLM"].rows() if "projector_type" in row[0])
    depths = [projector_depth(name) for name in code_spans(row[2])]
    assert depths == [0, 1, 1, 2, 8]
    assert projector_depth("mlp9x_gelu") < 0


def test_optional_fields_may_be_omitted() -> None:
    values = values_of("MobileCLIP-S0")
    for key in ("source", "text_config", "quantization"):
        values.pop(key, None)
    config = MobileCLIPConfig.from_json(values, "config")
    assert (config.source, config.text, config.quantization) == ({}, None, {})


# Quantization.


def test_quantization_is_documented() -> None:
    section = PAGE["Quantization"]
    entry, modes, tensors = section.tables()
    assert [code_spans(row[0])[0] for row in entry] == [f.name for f in fields(Quantization)]
    assert {
        code_spans(row[0])[0]: [{int(n) for n in cell.split(",")} for cell in row[1:]]
        for row in modes
    } == {mode: [set(bits), set(sizes)] for mode, (bits, sizes) in MODES.items()}
    (_, example), *_ = section.blocks
    assert len(read_quantized_layers(Fields({"quantization": json.loads(example)}, "example"))) == 2
    rows, columns = 8, 384
    for mode, bits in [("affine", 4), ("affine", 3), ("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)]:
        quantization = Quantization.of(mode, bits)
        scope = {"rows": rows, "columns": columns, "bits": bits, "mode": mode}
        scope["group_size"] = quantization.group_size
        dtypes = {"uint32": mx.uint32, "uint8": mx.uint8, "float": mx.float16}
        stated = {
            name.removeprefix("{layer}."): (eval(shape, scope), dtypes[dtype])
            for name, shape, dtype, condition in map(spans, tensors)
            if not condition or eval(condition, scope)
        }
        quantized = quantization.quantize(mx.zeros((rows, columns), mx.float16))
        assert stated == {name: (t.shape, t.dtype) for name, t in quantized.items()}, mode


def spans(row: list[str]) -> list[str]:
    """The code in each cell of a row; empty where there is none."""
    return [(code_spans(cell) or [""])[0] for cell in row]


# Tensors.


class Scope(dict[str, Any]):
    """Fields of a config and indices; dimensions are computed when an expression names them."""

    def __init__(self, dimensions: dict[str, str], values: dict[str, Any]):
        super().__init__(values)
        self.dimensions = dimensions

    def __missing__(self, name: str) -> Any:
        return eval(self.dimensions[name], {}, self)


def stated(
    title: str,
    config: dict[str, Any],
    indices: list[dict[str, int]],
    tower: str = "",
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a section lists for a config."""
    section = PAGE[title]
    *dimension_tables, rows = section.tables()
    dimensions = dict(spans(row) for row in dimension_tables[0]) if dimension_tables else {}
    tensors: dict[str, tuple[int, ...]] = {}
    for pattern, shape, condition in map(spans, rows):
        for index in _index_values(pattern, indices):
            scope = Scope(dimensions, config | index)
            if condition and not eval(condition, {}, scope):
                continue
            name = pattern.format(tower=tower, **index)
            assert name not in tensors, f"{name} is listed twice"
            tensors[name] = eval(shape, {}, scope)
    return tensors


def _index_values(pattern: str, indices: list[dict[str, int]]) -> list[dict[str, int]]:
    """Distinct values of the indices in a pattern; one empty dict if it has none."""
    named = [name for name in "ij" if f"{{{name}}}" in pattern]
    if not named:
        return [{}]
    values = dict.fromkeys(tuple(index[name] for name in named) for index in indices)
    return [dict(zip(named, value, strict=True)) for value in values]


def counted(count: int) -> list[dict[str, int]]:
    return [{"i": i} for i in range(count)]


def fastvit(config: dict[str, Any], tower: str) -> dict[str, tuple[int, ...]]:
    indices = [{"i": i, "j": j} for i, count in enumerate(config["layers"]) for j in range(count)]
    return stated("FastViT tensors", config, indices, tower)


def fastvlm(config: FastVLMConfig) -> dict[str, tuple[int, ...]]:
    values = config.to_json()
    text = values["text_config"]
    return (
        fastvit(values["vision_config"], "vision_tower")
        | stated("Projector tensors", values, counted(projector_depth(config.projector_type)))
        | stated("Decoder tensors", text, counted(text["num_hidden_layers"]))
    )


def mobileclip(config: MobileCLIPConfig) -> dict[str, tuple[int, ...]]:
    values = config.to_json()
    image, text = values["image_config"], values.get("text_config")
    if image["tower"] == "fastvit":
        tensors = fastvit(image, "image.trunk")
    else:
        tensors = stated("ViT tensors", image, counted(image["layers"]))
    if text:
        scope = {"embed_dim": config.embed_dim, **text}
        indices = counted(text["layers"] + 2 * text["rep_mixers"])
        tensors |= stated("Text tensors", scope, indices)
    scope = {"embed_dim": config.embed_dim, "text_config": text, **image}
    return tensors | stated("Other tensors of MobileCLIP", scope, [])


DEMO = FastVLMConfig.from_json(fastvlm_values(), "demo")
AS_WIDE_AS_THE_TOWER = replace(DEMO.text, hidden_size=DEMO.vision.features, num_attention_heads=8)
FASTVLMS = {
    "demo": DEMO,
    "published tower": replace(DEMO, vision=PRESETS["fastvithd"]),
    "untied": replace(DEMO, text=replace(DEMO.text, tie_word_embeddings=False)),
    "linear": replace(DEMO, projector_type="linear"),
    "identity": replace(DEMO, projector_type="identity", text=AS_WIDE_AS_THE_TOWER),
}


@pytest.mark.parametrize("name", FASTVLMS)
def test_documented_tensors_equal_fastvlm(name: str) -> None:
    assert_same(fastvlm(FASTVLMS[name]), shapes(FastVLM(FASTVLMS[name])))


@pytest.mark.parametrize("variant", [*VARIANTS, "demo", "image tower alone"])
def test_documented_tensors_equal_mobileclip(variant: str) -> None:
    if variant == "demo":
        config = MobileCLIPConfig.from_json(read_json(DEMOS["mobileclip"] / "config.json"), "demo")
    else:
        config = VARIANTS.get(variant) or replace(VARIANTS["MobileCLIP-S0"], text=None)
    assert_same(mobileclip(config), shapes(MobileCLIP(config)))


def shapes(model: FastVLM | MobileCLIP) -> dict[str, tuple[int, ...]]:
    tensors = {name: tuple(tensor.shape) for name, tensor in named_parameters(model).items()}
    weights = [name for name, shape in tensors.items() if len(shape) == 2 and ".weight" in name]
    matrices = {name.removesuffix(".weight") for name in weights}
    quantizable = {n for n, layer in model.named_modules() if hasattr(layer, "to_quantized")}
    assert quantizable == matrices  # as the section on quantization says
    return tensors


def assert_same(page: dict[str, tuple[int, ...]], model: dict[str, tuple[int, ...]]) -> None:
    assert not model.keys() - page.keys(), "missing in the document"
    assert not page.keys() - model.keys(), "listed, but no model has it"
    assert {n: s for n, s in page.items() if s != model[n]} == {}, "another shape"


def test_every_documented_tensor_exists() -> None:
    """A pattern that no model has would never be compared."""
    known = [shapes(FastVLM(config)) for config in FASTVLMS.values()]
    known += [shapes(MobileCLIP(config)) for config in VARIANTS.values()]
    names = {re.sub(r"\.\d+(?=\.|$)", ".#", name) for tensors in known for name in tensors}
    sections: list[Section] = [s for s in PAGE.under("Tensors") if s.tables()]
    for row in (row for section in sections for row in section.tables()[-1]):
        pattern = re.sub(r"\.({\w}|\d+)(?=\.|$)", ".#", spans(row)[0])
        towers = [pattern.replace("{tower}", t) for t in ("vision_tower", "image.trunk")]
        assert names & set(towers), f"{row[0]}: no model has such a tensor"


# Files.


@pytest.mark.parametrize("kind", DEMOS)
def test_files_of_a_checkpoint_are_documented(kind: str, tmp_path: Path) -> None:
    convert(str(DEMOS[kind]), tmp_path / "out", dtype="bfloat16", quiet=True)
    listed = {code_spans(row[0])[0] for row in PAGE["Files"].rows()}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "NOTICE"} < files <= listed
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        dtypes = {name: part.get_dtype() for name, part in parts.items()}
    scale = dtypes.pop("logit_scale", "F32")
    assert (set(dtypes.values()), scale) == ({"BF16"}, "F32")
