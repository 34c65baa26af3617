"""Hostile checkpoints: each is refused in one line that names the fault, or does no harm."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import isolated
import mlx.core as mx
import numpy as np
import pytest
import synthetic

VICTIM = "model.norm.weight"  # (64,), float32
Build = Callable[[Path], None]


def put(path: Path, data: bytes | str) -> None:
    """Replace a file; those of a case are links to the sound checkpoint's."""
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


# safetensors files


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def safetensors(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> Build:
    """Change the header's entry of one tensor."""

    def build(case: Path) -> None:
        path = case / "model.safetensors"
        header, data = header_of(path)
        header[VICTIM] |= changes
        put(path, safetensors(header, data))

    return build


def rewritten(change: Callable[[dict[str, Any], bytes], bytes]) -> Build:
    """Write the file anew from its header and data."""

    def build(case: Path) -> None:
        put(case / "model.safetensors", change(*header_of(case / "model.safetensors")))

    return build


def raw(data: bytes) -> Build:
    return lambda case: put(case / "model.safetensors", data)


def overlapping(header: dict[str, Any], data: bytes) -> bytes:
    other = next(k for k, v in header.items() if v.get("shape") == [64] and k != VICTIM)
    header[VICTIM] = header[other]
    return safetensors(header, data)


def with_hole(header: dict[str, Any], data: bytes) -> bytes:
    last = max((k for k in header if k[0] != "_"), key=lambda k: header[k]["data_offsets"][1])
    header[last]["data_offsets"] = [n + 64 for n in header[last]["data_offsets"]]
    return safetensors(header, data + bytes(64))


def twice_named(header: dict[str, Any], data: bytes, **changes: Any) -> bytes:
    again = json.dumps({VICTIM: header[VICTIM] | changes})[1:-1]
    return safetensors((json.dumps(header)[:-1] + ", " + again + "}").encode(), data)


def many_tensors(header: dict[str, Any], data: bytes) -> bytes:
    one = {"dtype": "U8", "shape": [1]}
    tiny = {f"{i}": one | {"data_offsets": [i, i + 1]} for i in range(20000)}
    return safetensors(tiny, bytes(20000))


UNSOUND = "not a sound safetensors file"
MALFORMED: dict[str, tuple[Build, str]] = {
    "64-bit product wraps": (entry(shape=[65536] * 4), UNSOUND),
    "product wraps, no data": (entry(shape=[65536] * 4, data_offsets=[0, 0]), UNSOUND),
    "negative shape": (entry(shape=[-8, -8]), UNSOUND),
    "32-bit wrap": (entry(shape=[(1 << 32) + 64]), UNSOUND),
    "fractional shape": (entry(shape=[64.5]), UNSOUND),
    "shape of texts": (entry(shape=["64"]), UNSOUND),
    "shape null": (entry(shape=None), UNSOUND),
    "shape smaller than data": (entry(shape=[32]), UNSOUND),
    "shape larger than data": (entry(shape=[128]), UNSOUND),
    "zero dimension": (entry(shape=[0, (1 << 31) - 1, (1 << 31) - 1]), UNSOUND),
    "100000 dimensions": (entry(shape=[64] + [1] * 100000), "has the shape"),
    "5 dimensions": (entry(shape=[64, 1, 1, 1, 1]), "has the shape"),
    "overlap": (rewritten(overlapping), UNSOUND),
    "hole": (rewritten(with_hole), UNSOUND),
    "trailing bytes": (rewritten(lambda h, d: safetensors(h, d + bytes(64))), UNSOUND),
    "truncated data": (rewritten(lambda h, d: safetensors(h, d[:-1])), UNSOUND),
    "duplicate with other shape": (
        rewritten(lambda h, d: twice_named(h, d, shape=[8, 8])),
        "has shape (8, 8) instead of (64,)",
    ),
    "duplicate with other data": (
        rewritten(lambda h, d: twice_named(h, d, data_offsets=[0, 256])),
        UNSOUND,
    ),
    "offsets reversed": (entry(data_offsets=[256, 0]), UNSOUND),
    "offsets negative": (entry(data_offsets=[-256, 0]), UNSOUND),
    "offsets past the end": (entry(data_offsets=[1 << 40, (1 << 40) + 256]), UNSOUND),
    "offsets beyond 64 bits": (entry(data_offsets=[0, 1 << 64]), UNSOUND),
    "offsets missing": (entry(data_offsets=None), UNSOUND),
    "unknown dtype": (entry(dtype="I4"), UNSOUND),
    "dtype a number": (entry(dtype=7), UNSOUND),
    "header 2^63 bytes": (raw((1 << 63).to_bytes(8, "little") + b"{}"), "a header of"),
    "header 5 MB": (raw((5 << 20).to_bytes(8, "little") + b"{}"), "a header of"),
    "header longer than file": (raw((1000).to_bytes(8, "little") + b"{}"), UNSOUND),
    "header no JSON": (raw(safetensors(b"{x", b"")), UNSOUND),
    "header no UTF-8": (raw(safetensors(b'{"\xff": 1}', b"")), UNSOUND),
    "header a list": (raw(safetensors(b"[1, 2]", b"")), UNSOUND),
    "header nested": (raw(safetensors(b'{"a":' + b"[" * 1000000, b"")), UNSOUND),
    "header without tensors": (raw(safetensors(b"{}", b"")), "named like no known FastVLM"),
    "metadata no texts": (
        rewritten(lambda h, d: safetensors(h | {"__metadata__": {"a": [1]}}, d)),
        UNSOUND,
    ),
    "20000 tensors": (rewritten(many_tensors), "named like no known FastVLM"),
    "empty": (raw(b""), UNSOUND),
    "7 bytes": (raw(b"1234567"), "a header of"),
    "GGUF": (raw(b"GGUF\x03\0\0\0" + b"\xff" * 64), "a header of"),
    "zip": (raw(b"PK\x03\x04" + bytes(200)), "a header of"),
    "pickle": (raw(b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR." + bytes(99)), "a header of"),
}


# Tensors in sound files


def tensors(change: Callable[[dict[str, Any]], Any]) -> Build:
    """Change the tensors of the sound checkpoint."""

    def build(case: Path) -> None:
        path = case / "model.safetensors"
        loaded = dict(mx.load(str(path)))
        change(loaded)
        path.unlink()
        mx.save_safetensors(str(path), loaded)

    return build


def victim(value: mx.array) -> Build:
    return tensors(lambda t: t.update({VICTIM: value}))


def with_value(bad: float) -> mx.array:
    return mx.where(mx.arange(64) == 7, bad, 1.0)


def overflowing(loaded: dict[str, Any]) -> None:
    """Finite weights, infinite logits."""
    loaded[VICTIM] = mx.full((64,), 1e36)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        loaded[name] = loaded[name] * 1e4


MISFITS: dict[str, tuple[Build, str]] = {
    "missing": (tensors(lambda t: t.pop(VICTIM)), f"1 missing: {VICTIM}"),
    "extra": (tensors(lambda t: t.update(x=mx.ones(3))), "1 with no place in the model: x"),
    "misshapen": (victim(mx.ones((65,))), "has shape (65,) instead of (64,)"),
    "transposed": (victim(mx.ones((1, 64))), "has shape (1, 64) instead of (64,)"),
    "int8": (victim(mx.ones((64,), mx.int8)), "is I8, not one of"),
    "complex": (victim(mx.ones((64,), mx.complex64)), "is C64, not one of"),
    "bool": (victim(mx.ones((64,), mx.bool_)), "is BOOL, not one of"),
    "uint32 for float": (victim(mx.ones((64,), mx.uint32)), f"{VICTIM} is mlx.core.uint32"),
    "int64 for float": (victim(mx.ones((64,), mx.int64)), f"{VICTIM} is mlx.core.int64"),
    "NaN": (victim(with_value(float("nan"))), "not finite in float32"),
    "infinite": (victim(with_value(float("-inf"))), "not finite in float32"),
    "overflowing": (tensors(overflowing), "the decoder's logits are not finite"),
    "escapes in a name": (
        tensors(lambda t: t.update({"\x1b]0;owned\x07\n\nok: done": mx.ones(3)})),
        "\ufffd]0;owned\ufffd\ufffd\ufffdok: done",
    ),
    "a name of 1 MB": (tensors(lambda t: t.update({"n" * 1000000: mx.ones(3)})), "no place"),
}


# Indices


def index(files: Any) -> Build:
    """An index whose first tensor lies in `files`, or that is `files` if it is no text."""

    def build(case: Path) -> None:
        names = header_of(case / "model.safetensors")[0]
        weight_map: Any = {k: "model.safetensors" for k in names if k[0] != "_"}
        if isinstance(files, dict) and "weight_map" in files:
            weight_map = files["weight_map"]
        else:
            weight_map[VICTIM] = files
        data = json.dumps({"weight_map": weight_map})
        put(case / "model.safetensors.index.json", data)

    return build


def in_two_shards(case: Path) -> None:
    index("model-2.safetensors")(case)
    mx.save_safetensors(str(case / "model-2.safetensors"), {VICTIM: mx.ones(64)})


def shard_is_directory(case: Path) -> None:
    index("model-2.safetensors")(case)
    (case / "model-2.safetensors").mkdir()


OUTSIDE = "is not the name of a shard beside it"
INDICES: dict[str, tuple[Build, str]] = {
    "escapes": (index("../sound/model.safetensors"), OUTSIDE),
    "escapes below": (index("a/../../x.safetensors"), OUTSIDE),
    "absolute": (index("/etc/passwd"), OUTSIDE),
    "absolute safetensors": (index("/tmp/x.safetensors"), OUTSIDE),
    "backslashes": (index("..\\x.safetensors"), OUTSIDE),
    "NUL": (index("x\0.safetensors"), OUTSIDE),
    "newline": (index("x.safetensors\n"), OUTSIDE),
    "pickle shard": (index("pytorch_model.bin"), OUTSIDE),
    "number": (index(5), OUTSIDE),
    "nested": (index([["x.safetensors"]]), OUTSIDE),
    "missing shard": (index("model-9.safetensors"), "the index names this shard"),
    "shard is a directory": (shard_is_directory, "the index names this shard"),
    "tensor in two shards": (in_two_shards, "of another shard"),
    "no map": (index({"weight_map": None}), "has no weight_map"),
    "map a list": (index({"weight_map": ["x"]}), "has no weight_map"),
    "17 MB": (
        lambda case: put(case / "model.safetensors.index.json", b" " * (17 << 20)),
        "larger than 16 MB",
    ),
}


# Configs


def config(**changes: Any) -> Build:
    """Change config.json; a None removes the field."""

    def build(case: Path) -> None:
        values = json.loads((case / "config.json").read_text()) | changes
        values = {k: v for k, v in values.items() if v is not None}
        put(case / "config.json", json.dumps(values))

    return build


def config_file(data: bytes | str) -> Build:
    return lambda case: put(case / "config.json", data)


def config_pipe(case: Path) -> None:
    (case / "config.json").unlink()
    os.mkfifo(case / "config.json")


def config_loop(case: Path) -> None:
    (case / "config.json").unlink()
    (case / "config.json").symlink_to("config.json")


def tied_bomb(case: Path) -> None:
    """Tied tensors are compared; misshapen ones must not be compared at the size claimed."""
    small = {name: mx.ones((2, 2)) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    tensors(lambda t: t.update(small))(case)
    config(vocab_size=1_000_000, hidden_size=65536)(case)


def nested(depth: int) -> str:
    return '{"hidden_size": ' + "[" * depth + "]" * depth + "}"


def vision(**values: Any) -> Build:
    return config(vision_config=values)


UNFIT = "tensors do not fit the model its config describes"
CONFIGS: dict[str, tuple[Build, str]] = {
    "missing": (lambda case: (case / "config.json").unlink(), "cannot be read"),
    "empty": (config_file(""), "not valid JSON"),
    "no object": (config_file("[]"), "holds no JSON object"),
    "no UTF-8": (config_file(b"\xff\xfe\x00{"), "not valid JSON"),
    "2 MB": (config_file(b" " * (2 << 20)), "larger than 1 MB"),
    "100 MB": (config_file(b"[" * (100 << 20)), "larger than 1 MB"),
    "nested 500000": (config_file("[" * 500000), "not valid JSON"),
    "nested 900": (config_file(nested(900)), "config.json"),
    "integer of 5000 digits": (config_file('{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
    "duplicate keys": (config_file('{"model_type": "a", "model_type": "b"}'), "appears twice"),
    "pipe": (config_pipe, "is not a regular file"),
    "link to itself": (config_loop, "cannot be read"),
    "other model": (config(model_type="clip"), "is not a FastVLM"),
    "escapes in the type": (config(model_type="\x1b[2J\nok"), "model_type: is not a string"),
    "model type an object": (config(model_type={}), "model_type: is not a string"),
    "model_file": (config(model_file="evil.py"), "code of a checkpoint is never run"),
    "hidden size 2^62": (config(hidden_size=1 << 62), "hidden_size"),
    "hidden size largest": (config(hidden_size=65536, num_hidden_layers=256), UNFIT),
    "hidden size negative": (config(hidden_size=-64), "hidden_size"),
    "hidden size true": (config(hidden_size=True), "hidden_size: True is not an integer"),
    "hidden size NaN": (config(hidden_size=float("nan")), "hidden_size: nan"),
    "hidden size text": (config(hidden_size="64"), "hidden_size: '64'"),
    "hidden size missing": (config(hidden_size=None), "hidden_size: is missing"),
    "layers 10^9": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads"),
    "odd heads": (config(num_attention_heads=64), "hidden_size"),
    "heads uneven": (config(num_key_value_heads=3), "num_key_value_heads"),
    "vocabulary 10^12": (config(vocab_size=10**12), "vocab_size"),
    "vocabulary 1": (config(vocab_size=1), UNFIT),
    "eps infinite": (config(rms_norm_eps=float("inf")), "rms_norm_eps"),
    "theta 0": (config(rope_theta=0), "rope_theta"),
    "rope a list": (config(rope_scaling=[1]), "rope_scaling"),
    "rope yarn": (config(rope_scaling={"type": "yarn"}), "only plain rotary positions"),
    "tying a number": (config(tie_word_embeddings=1), "tie_word_embeddings"),
    "tied bomb": (tied_bomb, UNFIT),
    "projector deep": (config(mm_projector_type="mlp99999999x_gelu"), "projector_type"),
    "projector unknown": (config(mm_projector_type="__import__('os')"), "projector_type"),
    "tower unknown": (config(mm_vision_tower="../../tower"), "is not FastViTHD"),
    "image size 99999": (config(mm_vision_tower="mobileclip_l_99999"), "image_size"),
    "image size 300": (config(mm_vision_tower="mobileclip_l_300"), "image_size"),
    "context 10^12": (config(tokenizer_model_max_length=10**12), "tokenizer_model_max_length"),
    "stages a number": (vision(layers=5), "layers: is not a list"),
    "stages 10^5": (vision(layers=[1] * 100000), "layers: is not a list"),
    "blocks 10^6": (vision(layers=[1000000] * 5), "layers: 1000000"),
    "widths largest": (
        vision(layers=[64] * 5, embed_dims=[512 << i for i in range(5)], mlp_ratios=[16] * 5),
        UNFIT,
    ),
    "widths 0": (vision(embed_dims=[0] * 5), "embed_dims"),
    "widths 1": (vision(embed_dims=[1, 2, 4, 8, 16]), "embed_dims"),
    "widths uneven": (vision(embed_dims=[8, 16, 32, 64, 96]), "embed_dims"),
    "vision a text": (config(vision_config="big"), "vision_config: is not an object"),
}


# Quantisation that lies


def quantized(claim: Any, *, columns: int = 3) -> Build:
    """One layer in groups of 32 at 4 bits, whatever the config claims."""

    def change(loaded: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.down_proj"  # 64 x 96
        loaded[f"{name}.weight"] = mx.zeros((64, 12), mx.uint32)
        for part in ("scales", "biases"):
            loaded[f"{name}.{part}"] = mx.ones((64, columns))

    def build(case: Path) -> None:
        tensors(change)(case)
        config(quantization=claim)(case)

    return build


def packing(bits: Any = 4, group_size: Any = 32, mode: Any = "affine") -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "mode": mode}


DOWN = "model.layers.0.mlp.down_proj"
QUANTIZED: dict[str, tuple[Build, str]] = {
    "no word of it": (quantized(None), "config.json says nothing of quantization"),
    "no object": (quantized([4, 32]), "quantization: is not an object"),
    **{
        f"bits {bits!r}": (quantized(packing(bits=bits)), "bits")
        for bits in (0, -4, 1, 7, 10**9, "4", True, 4.5, None)
    },
    **{
        f"group {size!r}": (quantized(packing(group_size=size)), "group_size")
        for size in (0, -32, 48, 10**9, "32", None)
    },
    "group too wide": (quantized(packing(group_size=64)), "no multiple of the group_size 64"),
    "other bits": (quantized(packing(bits=8)), "has shape (64, 12) instead of (64, 24)"),
    "scales one too many": (quantized(packing(), columns=4), "has shape (64, 4)"),
    "scales one too few": (quantized(packing(), columns=2), "has shape (64, 2)"),
    "unknown mode": (quantized(packing(mode="exec")), "mode: 'exec' is not one of"),
    "float scales for mxfp4": (quantized(packing(mode="mxfp4")), "is mlx.core.float32"),
    "layer override": (quantized({**packing(), DOWN: packing(bits=0)}), "bits"),
}


def canonical(**changes: Any) -> Build:
    """Change the config.json of a converted checkpoint."""

    def build(case: Path) -> None:
        shutil.rmtree(case)
        shutil.copytree(case.parent / "canonical", case, copy_function=os.link)
        values = json.loads((case / "config.json").read_text())
        for key, value in changes.items():
            part, _, field = key.rpartition("__")
            (values[part] if part else values)[field] = value
        put(case / "config.json", json.dumps(values))

    return build


CANONICAL: dict[str, tuple[Build, str]] = {
    "newer": (canonical(format_version=99), "newer than this program"),
    "no version": (canonical(format_version=None), "format_version: is missing"),
    "source a list": (canonical(source=[1, 2]), "source: is not an object"),
    "source nested": (canonical(source={"model": {"a": 1}}), "source: model: is not a string"),
    "source with escapes": (canonical(source={"layout": "\x1b[2J"}), "source: layout: is not a"),
    "packs nothing": (canonical(quantization={"x.y": packing()}), "no layer that can be packed"),
    "packs a convolution": (
        canonical(quantization={"vision_tower.stem.conv": packing()}),
        "no layer that can be packed",
    ),
    "packs a norm": (
        canonical(quantization={"language_model.norm": packing()}),
        "no layer that can be packed",
    ),
    "packs floats": (
        canonical(quantization={"language_model.embed_tokens": packing()}),
        "its tensors do not fit its config",
    ),
    "packs uneven": (
        canonical(quantization={"language_model.layers.0.mlp.down_proj": packing(group_size=64)}),
        "no multiple of group_size 64",
    ),
    "deeper": (canonical(text_config__num_hidden_layers=256), "missing language_model.layers."),
    "wider": (canonical(text_config__hidden_size=65536), "instead of"),
    "shallower": (canonical(text_config__num_hidden_layers=1), "no place for"),
    "identity": (canonical(projector_type="identity"), "identity needs features as wide"),
    "image size": (canonical(image_size=1 << 40), "image_size"),
    "image mode": (canonical(image_mode="stretch"), "image_mode"),
    "one stage": (canonical(vision_config__layers=[1]), "embed_dims: has 5 entries instead of 1"),
    "text config": (canonical(text_config=[]), "text_config: is not an object"),
}


# Tokenizers


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Build:
    def build(case: Path) -> None:
        data = json.loads((case / "tokenizer.json").read_text())
        put(case / "tokenizer.json", json.dumps(change(data) or data))

    return build


def vocab(**changes: Any) -> Build:
    return tokenizer(lambda d: d["model"]["vocab"].update(changes))


def merges(*entries: Any) -> Build:
    return tokenizer(lambda d: d["model"]["merges"].extend(entries))


def sparse(case: Path) -> None:
    put(case / "tokenizer.json", b"{")
    os.truncate(case / "tokenizer.json", 65 << 20)


def split_tables(merges: str | bytes | None, added: str = "added_tokens.json") -> Build:
    def build(case: Path) -> None:
        (case / "tokenizer.json").unlink()
        synthetic.write_tokenizer(case, split=True)
        (case / "added_tokens.json").rename(case / added)
        (case / "merges.txt").unlink()
        if merges is None:
            os.mkfifo(case / "merges.txt")
        else:
            put(case / "merges.txt", merges)

    return build


TOKENIZERS: dict[str, tuple[Build, str]] = {
    "missing": (lambda case: (case / "tokenizer.json").unlink(), "neither tokenizer.json nor"),
    "no JSON": (lambda case: put(case / "tokenizer.json", "x"), "not valid JSON"),
    "65 MB": (sparse, "larger than 32 MB"),
    "nested": (lambda case: put(case / "tokenizer.json", "[" * 1000000), "not valid JSON"),
    "no model": (tokenizer(lambda d: {"added_tokens": []}), "not a byte-level BPE tokenizer"),
    "model a list": (tokenizer(lambda d: d | {"model": []}), "not a byte-level BPE tokenizer"),
    "added a number": (tokenizer(lambda d: d | {"added_tokens": 5}), "not a byte-level BPE"),
    "added nested": (
        tokenizer(lambda d: d["added_tokens"].append({"content": [[]], "id": 9})),
        "not a byte-level BPE",
    ),
    "added a null": (
        tokenizer(lambda d: d["added_tokens"].append({"content": None, "id": 299})),
        "a token is not a text",
    ),
    "id negative": (vocab(x=-1), "the id of 'x' is not"),
    "id 2^32": (vocab(x=1 << 32), "the id of 'x' is not"),
    "id huge": (vocab(x=10**30), "the id of 'x' is not"),
    "id true": (vocab(x=True), "the id of 'x' is not"),
    "id fraction": (vocab(x=1.5), "the id of 'x' is not"),
    "id a list": (vocab(x=[1]), "the id of 'x' is not"),
    "id beyond the embedding": (vocab(xyz=384), "belong to different models"),
    "ids shared": (vocab(xyz=7), "two tokens share an id"),
    "id also added": (vocab(xyz=264), "is both an added token and another one"),
    "bytes missing": (
        tokenizer(lambda d: d["model"]["vocab"].update(a1=d["model"]["vocab"].pop("a"))),
        "has no token for 1 of the 256 bytes",
    ),
    "no control tokens": (
        tokenizer(lambda d: d | {"added_tokens": d["added_tokens"][:2]}),
        "has no <|im_end|>",
    ),
    "no vocabulary": (tokenizer(lambda d: d["model"].update(vocab={})), "an empty table"),
    "Unigram": (tokenizer(lambda d: d["model"].update(vocab=[[1, 2]])), "a token is not a text"),
    "half a surrogate": (vocab(**{"\ud800": 300}), "unusable tables"),
    "merge of unknowns": (merges("zz qq"), "unusable tables"),
    "merge to an unknown": (merges("q z"), "unusable tables"),
    "merge of three": (merges("a b c"), "not a byte-level BPE tokenizer"),
    "merge of one": (merges("ab"), "not a byte-level BPE tokenizer"),
    "merge a number": (merges(5), "not a byte-level BPE tokenizer"),
    "merge of numbers": (merges([1, 2]), "not a byte-level BPE tokenizer"),
    "merges.txt a pipe": (split_tables(None), "is not a regular file"),
    "merges.txt binary": (split_tables(b"\xff\xfe a"), "cannot be read"),
    "merges.txt of three": (split_tables("a b c"), "cannot be read"),
    "no added tokens": (split_tables("t h", "added.json"), "tokenizer_config.json"),
}


# What looks hostile and does no harm


def planted_code(case: Path) -> None:
    for name in ("evil", "modeling_llava_qwen", "tokenization_qwen2", "__init__", "json"):
        put(case / f"{name}.py", f"open({str(case / 'pwned')!r}, 'w')")
    automatic = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Model")
    config(auto_map=automatic, _attn_implementation_internal="evil/kernels")(case)
    put(case / "tokenizer_config.json", json.dumps({"auto_map": automatic}))


def hostile_template(case: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}x"
    put(case / "chat_template.jinja", template)
    put(case / "chat_template.json", json.dumps({"chat_template": template}))
    put(case / "tokenizer_config.json", json.dumps({"chat_template": {"../../x": template}}))


def hostile_pattern(case: Path) -> None:
    bad = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    tokenizer(lambda d: d | {"pre_tokenizer": bad, "normalizer": {"type": "Bogus"}})(case)


def other_formats(case: Path) -> None:
    for name in ("model.gguf", "weights.npz", "pytorch_model.bin", "model.safetensors.bak"):
        put(case / name, b"\xff" * 64)
    put(case / "._model.safetensors", b"\0\5\x16\7" + bytes(100))  # left by macOS's unzip


HARMLESS: dict[str, Build] = {
    "as it is": lambda case: None,
    "planted code": planted_code,
    "hostile template": hostile_template,
    "hostile pattern": hostile_pattern,
    "m[1]*?": lambda case: None,
    "-rf {0} %s": lambda case: None,
    "other formats": other_formats,
    "identical duplicates": rewritten(twice_named),
    "split tables": split_tables("\n".join(synthetic.MERGES)),
}

GROUPS = {
    "file": MALFORMED,
    "tensors": MISFITS,
    "index": INDICES,
    "config": CONFIGS,
    "quantization": QUANTIZED,
    "canonical": CANONICAL,
    "tokenizer": TOKENIZERS,
}
REFUSED = [(group, name) for group, cases in GROUPS.items() for name in cases]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, isolated.Outcome]:
    """Every case of this file, run in one go."""
    base = tmp_path_factory.mktemp("checkpoints")
    sound = synthetic.write_layout(base / "sound", "llava_qwen2")
    convert = ["--model", str(sound), "--mlx-path", str(base / "canonical"), "--dtype", "float32"]
    isolated.assert_done(isolated.run([("convert", convert)])[0])
    builds = {f"{group} {name}": GROUPS[group][name][0] for group, name in REFUSED} | HARMLESS
    directories = {}
    for i, (name, build) in enumerate(builds.items()):
        # A name that says something is one of the attacks; the rest must not depend on theirs.
        directories[name] = base / (name if name in HARMLESS else f"case{i}")
        shutil.copytree(sound, directories[name], copy_function=os.link)
        build(directories[name])
    ask = ["--prompt", "Hello", "--max-tokens", "4", "--dtype", "float32"]
    cases = [("answer", ["--model", str(d), *ask]) for d in directories.values()]
    return dict(zip(builds, isolated.run(cases), strict=True))


@pytest.mark.parametrize(("group", "name"), REFUSED)
def test_is_refused(outcomes: dict[str, isolated.Outcome], group: str, name: str) -> None:
    isolated.assert_refused(outcomes[f"{group} {name}"], GROUPS[group][name][1])


@pytest.mark.parametrize("name", HARMLESS)
def test_does_no_harm(outcomes: dict[str, isolated.Outcome], name: str) -> None:
    isolated.assert_done(outcomes[name])
    assert outcomes[name].out == outcomes["as it is"].out


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    case = synthetic.write_layout(tmp_path / "case", "llava_qwen2")
    planted_code(case)
    code = (
        "import sys; from mlx_fastvlm import load, generate; "
        "generate(*load(sys.argv[1]), 'Hello', max_tokens=2); "
        "print([m for m in ('transformers', 'jinja2', 'torch', 'evil') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(case)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=isolated.ENVIRONMENT,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert not (case / "pwned").exists()


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """A damaged file is refused, or differs in values only."""
    sound = synthetic.write_layout(tmp_path / "sound", "llava_qwen2")
    data = (sound / "model.safetensors").read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(5)
    cases = []
    for i in range(40):
        case = tmp_path / f"case{i}"
        shutil.copytree(sound, case, copy_function=os.link)
        damaged = bytearray(data)
        # Most of the file is values; most of the attack surface is the header.
        for place in rng.integers(0, header_bytes if i % 4 else len(data), 1 + i % 3):
            damaged[place] ^= 1 << int(rng.integers(8))
        put(case / "model.safetensors", bytes(damaged))
        cases.append(("answer", ["--model", str(case), "--prompt", "x", "--max-tokens", "1"]))
    statuses = []
    for outcome in isolated.run(cases):
        statuses.append(outcome.status)
        if outcome.status:
            isolated.assert_refused(outcome, "")
    assert set(statuses) <= {0, 1}
    assert statuses.count(1) > 15
