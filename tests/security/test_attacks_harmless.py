"""Suspicious checkpoints that are read without harm."""

import json
import subprocess
import sys
from pathlib import Path

import attacks
import isolated
import pytest
import synthetic
from attacks import Build, config, put, rewrite_safetensors, split_tables, tokenizer, with_duplicate


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
    "identical duplicates": rewrite_safetensors(with_duplicate),
    "split tables": split_tables("\n".join(synthetic.MERGES)),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, isolated.Outcome]:
    """Outcomes of all cases of HARMLESS."""
    sound = attacks.write_sound(tmp_path_factory.mktemp("checkpoints"))
    return attacks.outcomes(sound, HARMLESS, named=True)


@pytest.mark.parametrize("name", HARMLESS)
def test_suspicious_checkpoint_is_read_without_harm(
    outcomes: dict[str, isolated.Outcome], name: str
) -> None:
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
    result = subprocess.run(
        [sys.executable, "-c", code, str(case)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=isolated.ENVIRONMENT,
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")
    assert not (case / "pwned").exists()
