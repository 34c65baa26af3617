"""Hostile indices and configs: each is refused in one line that names the fault."""

import json
import os
from pathlib import Path
from typing import Any

import attacks
import isolated
import mlx.core as mx
import pytest
from attacks import VICTIM, Build, Cases, config, header_of, put, tensors

from mlx_fastvlm import load

# Indices


def index(files: Any) -> Build:
    """Write an index that maps VICTIM to `files`, or has the weight_map of `files`."""

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
INDICES: Cases = {
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
    "missing shard": (index("model-9.safetensors"), "the index lists this shard"),
    "shard is a directory": (shard_is_directory, "the index lists this shard"),
    "tensor in two shards": (in_two_shards, "of another shard"),
    "no map": (index({"weight_map": None}), "has no weight_map"),
    "map a list": (index({"weight_map": ["x"]}), "has no weight_map"),
    "17 MB": (
        lambda case: put(case / "model.safetensors.index.json", b" " * (17 << 20)),
        "larger than 16 MB",
    ),
}


# Configs


def config_file(data: bytes | str) -> Build:
    return lambda case: put(case / "config.json", data)


def config_pipe(case: Path) -> None:
    (case / "config.json").unlink()
    os.mkfifo(case / "config.json")


def config_loop(case: Path) -> None:
    (case / "config.json").unlink()
    (case / "config.json").symlink_to("config.json")


def tied_bomb(case: Path) -> None:
    """Tied tensors are compared, but not expanded to a claimed size."""
    small = {name: mx.ones((2, 2)) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    tensors(lambda t: t.update(small))(case)
    config(vocab_size=1_000_000, hidden_size=65536)(case)


def nested(depth: int) -> str:
    return '{"hidden_size": ' + "[" * depth + "]" * depth + "}"


def vision(**values: Any) -> Build:
    return config(vision_config=values)


UNFIT = "tensors do not fit the model its config describes"
CONFIGS: Cases = {
    "missing": (lambda case: (case / "config.json").unlink(), "cannot be read"),
    "empty": (config_file(""), "not valid JSON"),
    "no object": (config_file("[]"), "is not a JSON object"),
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
    "rope yarn": (config(rope_scaling={"type": "yarn"}), "only the default rotary embedding"),
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


GROUPS = {"index": INDICES, "config": CONFIGS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, isolated.Outcome]:
    """Outcomes of all cases of GROUPS."""
    sound = attacks.write_sound(tmp_path_factory.mktemp("checkpoints"))
    return attacks.outcomes(sound, attacks.builds(GROUPS))


@pytest.mark.parametrize(("group", "name"), attacks.refused(GROUPS))
def test_hostile_config_is_refused(
    outcomes: dict[str, isolated.Outcome], group: str, name: str
) -> None:
    isolated.assert_refused(outcomes[f"{group} {name}"], GROUPS[group][name][1])


def test_max_length_is_capped_at_the_trained_length(tmp_path: Path) -> None:
    path = attacks.write_sound(tmp_path)
    config(tokenizer_model_max_length=1 << 20, max_position_embeddings=1 << 20)(path)
    assert load(path)[1].max_length == 32768
    config(tokenizer_model_max_length=4096)(path)
    assert load(path)[1].max_length == 4096
