"""Answers meet their schema, choices or regular expression, or say that they were cut off."""

import gc
import json
import re
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_fastvlm import FastVLM, Processor, PromptCache, PromptError, generate, load
from mlx_fastvlm.generation import sampling

pytest.importorskip("llguidance", reason="pip install llguidance, the extra schema")
jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema, to validate")

from mlx_fastvlm.generation import grammar_check  # noqa: E402
from mlx_fastvlm.generation.constrained_loop import Matcher, vocabulary  # noqa: E402
from mlx_fastvlm.generation.constraints import MAX_CHARACTERS, Constraint  # noqa: E402

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
Loaded = tuple[FastVLM, Processor]


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load("demo")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2"))


class Noise:
    """Random logits without a decoder, which prefer what ends strings, lists and answers."""

    def __init__(self, processor: Processor, seed: int):
        tokenizer = processor.tokenizer
        self.rng = np.random.default_rng(seed)
        texts = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
        ends = [i in tokenizer.stop_ids or t[:1] in b'"]},' for i, t in enumerate(texts)]
        self.bias = np.where(ends, 3, 0)

    def make_cache(self, capacity: int, bits: int | None = None) -> list[Any]:
        return []

    def embed(self, ids: mx.array, features: mx.array | None = None) -> mx.array:
        return mx.zeros((*ids.shape, 1))

    _group = None

    def __call__(self, ids: mx.array, cache: Any, embeddings: Any, *, last_only: bool) -> mx.array:
        return mx.array(self.rng.normal(self.bias).astype(np.float32))[None, None]


# Random schemas.

NAMES = st.sampled_from(["a", "count", "two words", 'quo"te', "é", "properties", "$ref"])
PATTERNS = ["^[a-z]{1,3}$", "ab+c", r"^\d{2}-\d{2}$", "^(red|blue)?$", "[^a]", "^[A-Z]"]
VALUES = ["", "red", "日本", 'a "b"', "back\\slash", "\n", 0, -1.5, True, None, [1], {"a": 1}]


def integers(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


LEAVES = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(PATTERNS)),
    st.builds(integers, st.integers(-200, 5), st.integers(5, 3000)),
    st.builds(lambda n: {"type": "number", "exclusiveMaximum": n}, st.integers(-3, 3)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}]),
    st.sampled_from([{"type": "string", "format": f} for f in ("date", "ipv4", "uuid")]),
    st.builds(lambda v: {"enum": v}, st.lists(st.sampled_from(VALUES), min_size=1, max_size=4)),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(NAMES, inner, max_size=3)
    return st.one_of(
        st.builds(lambda s, n: {"type": "array", "items": s, "maxItems": n}, inner, st.just(3)),
        st.builds(lambda s: {"anyOf": s}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda p, n, extra: {
                "type": "object",
                "properties": p,
                "required": list(p)[:n],
                "additionalProperties": extra,
            },
            properties,
            st.integers(0, 3),
            st.sampled_from([False, {"type": "integer"}]),
        ),
        st.builds(lambda s: {"$ref": "#/$defs/part", "$defs": {"part": s}}, inner).filter(
            lambda schema: "$ref" not in json.dumps(schema["$defs"])
        ),
    )


def schemas() -> st.SearchStrategy[Any]:
    nested = st.recursive(LEAVES, containers, max_leaves=5)
    return nested.filter(lambda s: json.dumps(s).count("#/$defs") <= ("$defs" in s))


def assert_meets(schema: dict[str, Any], result: Any, max_tokens: int) -> None:
    if result.finish_reason == "length":
        assert result.stats.generation_tokens == max_tokens
        return
    assert result.finish_reason == "stop"
    value = json.loads(result.text)
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile all schemas here, which is quick as long as they are harmless."""
    monkeypatch.setattr(grammar_check, "MAY_BE_SLOW", ())


def property_test(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@given(schema=schemas(), seed=st.integers(0, 99))
@property_test(60)
def test_random_schemas(in_process: None, tiny: Loaded, schema: Any, seed: int) -> None:
    model: Any = Noise(tiny[1], seed)
    options: dict[str, Any] = {"temperature": 0.5 + seed / 99, "top_p": 0.9} if seed % 2 else {}
    result = generate(model, tiny[1], "q", schema=schema, max_tokens=150, seed=seed, **options)
    assert_meets(schema, result, 150)


@pytest.mark.parametrize("model", ["demo", "tiny"])
@pytest.mark.parametrize("temperature", [0, 1.5])
@given(schema=schemas())
@property_test(6)
def test_random_schemas_on_models(
    in_process: None, demo: Loaded, tiny: Loaded, model: str, temperature: float, schema: Any
) -> None:
    result = generate(
        *{"demo": demo, "tiny": tiny}[model], "q", schema=schema, max_tokens=40,
        temperature=temperature, top_k=40, seed=0,
    )  # fmt: skip
    assert_meets(schema, result, 40)


COUNT = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "count": integers(0, 9)},
    "required": ["shape", "count"],
    "additionalProperties": False,
}


CACHE = PromptCache()


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": 8},
        {"prompt_cache": CACHE},
        {"prompt_cache": CACHE},
        {"temperature": 1, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 1},
    ],
)
def test_options_that_go_together_with_a_schema(demo: Loaded, options: dict[str, Any]) -> None:
    result = generate(*demo, "How many?", SCENE, schema=COUNT, **options)
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), COUNT)
    assert demo[1].tokenizer.decode(result.token_ids) == result.text


def test_quantised_model() -> None:
    model, processor = load("demo")
    nn.quantize(model.language_model, 32, 4)
    result = generate(model, processor, "How many?", SCENE, schema=COUNT)
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), COUNT)


def test_a_complete_answer_needs_no_end_token(demo: Loaded) -> None:
    result = generate(*demo, "How many?", schema=COUNT)
    count = result.stats.generation_tokens
    assert result.finish_reason == "stop" and len(result.token_ids) == count
    again = generate(*demo, "How many?", schema=COUNT, max_tokens=count)
    assert (again.text, again.finish_reason) == (result.text, "stop")
    short = generate(*demo, "How many?", schema=COUNT, max_tokens=count - 1)
    assert short.text == result.text[:-1] and short.finish_reason == "length"


@pytest.mark.parametrize(
    "choices",
    [
        ["red", "red circle", "blue"],
        ['a "quote"', "back\\slash", "new\nline", "a/b", "\x7f", "%json {}"],
        ["e\u0301", "日本", "🎉", " space "],  # the tokenizer would compose the first one
    ],
)
def test_choices(tiny: Loaded, choices: list[str]) -> None:
    found = set()
    for seed in range(30):
        model: Any = Noise(tiny[1], seed)
        result = generate(model, tiny[1], "q", choice=choices, temperature=2, seed=seed)
        assert result.finish_reason == "stop"
        found.add(result.text)
    assert found == set(choices)


@pytest.mark.parametrize(
    "regex",
    [r"\d{3}-\d{4}", r"(yes|no), [a-z]{2,5}\.", "^[αβγ]{3}$", "", "(?i)ok", r"a/b?|\\\\|\\/"],
)
def test_regular_expressions(tiny: Loaded, regex: str) -> None:
    for seed in range(10):
        result = generate(Noise(tiny[1], seed), tiny[1], "q", regex=regex, temperature=1, seed=seed)
        assert result.finish_reason == "stop" and re.fullmatch(regex, result.text), result.text


def test_an_answer_that_is_cut_off_says_so(tiny: Loaded) -> None:
    result = generate(*tiny, "q", schema={"type": "string", "minLength": 90}, max_tokens=5)
    assert result.finish_reason == "length" and result.stats.generation_tokens == 5


def test_no_control_token_is_part_of_an_answer(tiny: Loaded) -> None:
    tokenizer = tiny[1].tokenizer
    constraint = Constraint.of(None, None, r"(?s).*")
    assert constraint
    allowed = np.flatnonzero(np.array(Matcher(constraint, tokenizer).mask()) == 0)
    without_text = {i for i in range(tokenizer.size) if not tokenizer.token_bytes(i)}
    assert set(allowed.tolist()) & without_text == tokenizer.stop_ids


def test_undecided_tokens_are_sampled_again(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> Iterator[str]:
        for seed in range(2):
            options = {"temperature": 3, "top_p": 0.99, "seed": seed, "max_tokens": 20}
            yield generate(*tiny, "q", regex="[a-z ]{30,}", **options).text

    expected = list(answers())
    monkeypatch.setattr(sampling, "BLOCKS", 1)
    monkeypatch.setattr(sampling, "BLOCK", 8)
    assert list(answers()) == expected


# What is refused.

PATTERNS_THAT_ALL_MATCH = [{"pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvw"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"schema": COUNT, "regex": "a"}, "schema and regex cannot be combined"),
    ({"schema": COUNT, "stop": "}"}, "schema and stop texts cannot be combined"),
    ({"choice": ["a"], "stop": ["b"]}, "choice and stop texts cannot be combined"),
    ({"schema": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}, "oneOf constraints are not"),
    ({"schema": {"not": {}}}, 'Unimplemented keys: ["not"]'),
    ({"schema": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"]'),
    ({"schema": {"enum": []}}, "Unsatisfiable schema"),
    ({"schema": {"$ref": "https://example.com/a.json"}}, "does not fetch resources"),
    ({"schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no answer can"),
    ({"schema": {"x-guidance": {"colour": "red"}}}, "schema cannot be used: unknown field"),
    ({"schema": {"a": float("nan")}}, "schema is not JSON"),
    ({"schema": {"a": {1, 2}}}, "schema is not JSON"),
    ({"schema": "{}"}, "schema must be a JSON schema as a dictionary"),
    ({"choice": []}, "choice must be a list of at least one non-empty"),
    ({"choice": "red,green"}, "choice must be a list of at least one non-empty"),
    ({"choice": ["a", ""]}, "choice must be a list of at least one non-empty"),
    ({"choice": ["\ud800"]}, "choice contains a surrogate"),
    ({"regex": b"a"}, "regex must be a string, not a bytes"),
    ({"regex": "a\\"}, "regex ends in a single backslash"),
    ({"regex": "(a"}, "regex cannot be used: unclosed group"),
    ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
    # Too large.
    ({"regex": "a" * MAX_CHARACTERS + "a"}, "more than 100000 characters"),
    ({"schema": {"enum": [f"value {i}" for i in range(20_000)]}}, "more than 100000 characters"),
    ({"regex": "(" * 50_000 + "a" + ")" * 50_000}, "regex has more than 100000"),
    ({"regex": "(" * 5_000 + "a" + ")" * 5_000}, "regex cannot be used"),
    # Too complex.
    ({"schema": {"allOf": [{"anyOf": [{"required": [f"{i}"]}, {"required": [f"a{i}"]}]}
                           for i in range(30)]}}, "schema"),
    ({"schema": {"type": "string", "allOf": PATTERNS_THAT_ALL_MATCH}}, "takes more than 2 s"),
    ({"schema": {"type": "integer", "multipleOf": 1_000_003}}, "takes more than 2 s"),
    ({"schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
     "schema is too complex: parser error"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(
    tiny: Loaded, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "MAX_COMPILE_S", 2.0)
    grammar_check.find_problem.cache_clear()
    started = time.monotonic()
    with pytest.raises(PromptError, match=re.escape(message)) as caught:
        generate(*tiny, "q", max_tokens=3, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.monotonic() - started < 10
    grammar_check.find_problem.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit the memory of a process")
def test_memory_of_compiling_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MAX_COMPILE_S", 60.0)
    monkeypatch.setattr(grammar_check, "MAX_COMPILE_BYTES", 64 << 20)
    with pytest.raises(PromptError, match="takes more than 64 MB to compile"):
        Constraint.of({"type": "string", "allOf": PATTERNS_THAT_ALL_MATCH}, None, None)
    grammar_check.find_problem.cache_clear()


def test_a_schema_nested_too_deep() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(PromptError, match="schema is not JSON"):
        Constraint.of(schema, None, None)
    while schema:  # one by one, since freeing it at once overflows the stack
        schema = schema.pop("items")


def test_a_schema_cannot_turn_coercion_on() -> None:
    options = {"coerce_one_of": True, "lenient": True, "whitespace_flexible": True}
    for keys in ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, {"not": {}}):
        with pytest.raises(PromptError, match="cannot be used"):
            Constraint.of({"x-guidance": options, **keys}, None, None)


# The vocabulary's table.


def test_the_table_is_made_once_and_freed_with_its_tokenizer(tmp_path: Path) -> None:
    _, processor = load(synthetic.write_layout(tmp_path, "llava_qwen2"))
    tokenizer = processor.tokenizer
    assert vocabulary(tokenizer) is vocabulary(tokenizer)
    table = vocabulary(tokenizer).result()
    assert table.vocab_size == tokenizer.size
    assert set(table.eos_tokens) == tokenizer.stop_ids
    gone = weakref.ref(tokenizer)
    del processor, tokenizer, table
    gc.collect()
    assert gone() is None
