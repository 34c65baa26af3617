"""Read the JSON schema that `--schema` names or contains."""

import json
from typing import Any

from mlx_mobileclip.errors import PromptError
from mlx_mobileclip.json_fields import read_bounded
from mlx_mobileclip.paths import user_path

MAX_SCHEMA_BYTES = 1 << 20


def read_schema(argument: str) -> dict[str, Any]:
    """Read a JSON object: the argument itself if it begins with `{`, else a file.

    Raises:
        ModelError: the file cannot be read, or there is no JSON object.
    """
    is_json = argument.lstrip().startswith("{")
    name = "--schema" if is_json else f"--schema {argument[:200]}"
    try:
        path = user_path(argument)
        data = argument if is_json else read_bounded(path, MAX_SCHEMA_BYTES, follow_links=True)
        schema = json.loads(data)
    except OSError as error:
        raise PromptError(
            f"{name}: cannot be read ({error.strerror or error}); give a file or a JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: also a NUL in the path
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise PromptError(f"{name}: not valid JSON ({reason})") from error
    if not isinstance(schema, dict):
        raise PromptError(f"{name}: is not a JSON object; a schema is one")
    return schema
