"""Derive a JSON schema from a Python type: a pydantic model or a dataclass."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mlx_mobileclip.errors import PromptError

SIMPLE = {str: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}
Schema = dict[str, Any]
Definitions = dict[type, Schema]  # referenced by position


def to_json_schema(source: object) -> Schema:
    """Return the JSON schema that a user gave as a dictionary, a pydantic model or a dataclass.

    Additional properties are not allowed, unless a pydantic model allows extra fields. A field
    with a default is optional.

    Args:
        source: A schema, or a type.

    Raises:
        PromptError: it is neither, or the type of a field has no counterpart in JSON.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, type) and hasattr(source, "model_json_schema"):
        return _pydantic_schema(source)
    if isinstance(source, type) and is_dataclass(source):
        if hasattr(source, "__pydantic_fields__"):  # only pydantic knows its constraints
            raise PromptError(
                f"schema: {source.__name__} is a pydantic dataclass; give "
                f"TypeAdapter({source.__name__}).json_schema()"
            )
        definitions: Definitions = {}
        reference = _dataclass_schema(source, definitions)
        return {**reference, "$defs": {str(i): s for i, s in enumerate(definitions.values())}}
    kind = source.__name__ if isinstance(source, type) else type(source).__name__
    raise PromptError(
        f"schema must be a JSON schema as a dictionary, a pydantic model or a dataclass, not {kind}"
    )


def _pydantic_schema(model: Any) -> Schema:
    try:
        schema: Schema = model.model_json_schema()
    except (RuntimeError, TypeError, ValueError) as error:  # pydantic's are RuntimeErrors
        raise PromptError(f"schema: {model.__name__}: {' '.join(str(error).split())}") from error
    for entry in (schema, *schema.get("$defs", {}).values()):
        if "properties" in entry:
            entry.setdefault("additionalProperties", False)
    return schema


def _dataclass_schema(source: Any, definitions: Definitions) -> Schema:
    """Add a dataclass and those of its fields to the definitions; returns a reference to it."""
    if source not in definitions:
        definitions[source] = {}  # a dataclass may contain itself
        try:
            hints = get_type_hints(source)
        except (NameError, TypeError) as error:
            raise PromptError(f"schema: {source.__name__}: {error}") from error
        members = [field for field in fields(source) if field.init]
        definitions[source] = {
            "type": "object",
            "properties": {
                field.name: _schema_of(hints[field.name], field.name, definitions)
                for field in members
            },
            "required": [field.name for field in members if _is_required(field)],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{list(definitions).index(source)}"}


def _is_required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _schema_of(kind: Any, field: str, definitions: Definitions) -> Schema:
    """Return the schema of a field's type."""
    origin, arguments = get_origin(kind), get_args(kind)

    def schemas(parts: Sequence[Any]) -> list[Schema]:
        return [_schema_of(part, field, definitions) for part in parts]

    if kind is Any:
        return {}
    if kind in SIMPLE:
        return {"type": SIMPLE[kind]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": schemas(arguments)}
    if origin in (list, Sequence):
        return {"type": "array", "items": schemas(arguments)[0]}
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        count = len(arguments)
        return {"type": "array", "prefixItems": schemas(arguments), "items": False,
                "minItems": count, "maxItems": count}  # fmt: skip
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": schemas(arguments[1:])[0]}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_schema(kind, definitions)
    name = getattr(kind, "__name__", None) or str(kind)
    raise PromptError(f"schema: {field}: {name:.60} has no counterpart in JSON; use another type")
