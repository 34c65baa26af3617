"""A pydantic model or a dataclass in place of a JSON schema."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal, Optional, Union

import pytest

from mlx_fastvlm import PromptError, generate, load
from mlx_fastvlm.generation.schema_types import to_json_schema


class Size(Enum):
    SMALL = "small"
    LARGE = 2


@dataclass
class Thing:
    name: str
    size: Size
    parts: list["Thing"] = field(default_factory=list)


@dataclass
class Scene:
    count: int
    share: float
    shown: bool
    colour: Literal["red", "blue"]
    best: Thing | None
    old: Optional[int]  # noqa: UP045
    either: Union[int, str]  # noqa: UP007
    place: tuple[int, str]
    names: dict[str, int]
    anything: Any = None
    derived: int = field(init=False, default=0)


def test_dataclass() -> None:
    schema = to_json_schema(Scene)
    assert schema["$ref"] == "#/$defs/0"
    scene, thing = schema["$defs"]["0"], schema["$defs"]["1"]
    assert scene["properties"] == {
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "shown": {"type": "boolean"},
        "colour": {"enum": ["red", "blue"]},
        "best": {"anyOf": [{"$ref": "#/$defs/1"}, {"type": "null"}]},
        "old": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "place": {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "items": False,
            "minItems": 2,
            "maxItems": 2,
        },
        "names": {"type": "object", "additionalProperties": {"type": "integer"}},
        "anything": {},
    }
    assert scene["required"] == list(scene["properties"])[:-1]
    assert scene["additionalProperties"] is False
    assert thing["properties"]["size"] == {"enum": ["small", 2]}
    assert thing["properties"]["parts"] == {"type": "array", "items": {"$ref": "#/$defs/1"}}
    assert thing["required"] == ["name", "size"]


def test_types_that_are_refused() -> None:
    @dataclass
    class Bytes:
        data: bytes

    @dataclass
    class Unknown:
        data: "Missing"  # noqa: F821

    with pytest.raises(PromptError, match="data: bytes has no counterpart in JSON"):
        to_json_schema(Bytes)
    with pytest.raises(PromptError, match="Unknown: name 'Missing' is not defined"):
        to_json_schema(Unknown)
    for source in (int, 3, "text", Thing("a", Size.SMALL)):
        with pytest.raises(PromptError, match="schema must be a JSON schema as a dictionary"):
            to_json_schema(source)


def test_answer_of_a_dataclass() -> None:
    pytest.importorskip("llguidance", reason="pip install llguidance, the extra schema")

    @dataclass
    class Answer:
        shape: Literal["circle", "square"]
        many: bool

    result = generate(*load("demo"), "Which shape?", schema=Answer)
    assert result.finish_reason == "stop"
    assert Answer(**json.loads(result.text)).shape in ("circle", "square")


def test_pydantic() -> None:
    pydantic = pytest.importorskip("pydantic", reason="pip install pydantic")
    pytest.importorskip("llguidance", reason="pip install llguidance, the extra schema")

    class Circle(pydantic.BaseModel):
        kind: Literal["circle"]
        radius: Annotated[int, pydantic.Field(ge=1, le=9)]

    class Square(pydantic.BaseModel):
        kind: Literal["square"]
        properties: bool

    class Shapes(pydantic.BaseModel):
        first: Annotated[Circle | Square, pydantic.Field(discriminator="kind")]
        second: Circle | None = None

    class Open(pydantic.BaseModel, extra="allow"):
        name: str

    result = generate(*load("demo"), "Which shapes?", schema=Shapes)
    assert result.finish_reason == "stop"
    Shapes.model_validate_json(result.text)
    schema = to_json_schema(Shapes)
    assert [part["additionalProperties"] for part in schema["$defs"].values()] == [False, False]
    assert to_json_schema(Open)["additionalProperties"] is True

    @pydantic.dataclasses.dataclass
    class Restricted:
        count: Annotated[int, pydantic.Field(ge=1)]

    with pytest.raises(PromptError, match=r"give TypeAdapter\(Restricted\)\.json_schema\(\)"):
        to_json_schema(Restricted)

    class Unusable(pydantic.BaseModel):
        thing: Callable[[], int]

    with pytest.raises(PromptError, match="schema: Unusable: ") as caught:
        to_json_schema(Unusable)
    assert "\n" not in str(caught.value)
