"""The JSON Schema of a pipeline file, with which editors complete keys and mark mistakes: `orchestrator schema`."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.stages.registry import every_stage, file_of

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
EXTENDS = "The path of a pipeline file that this one extends and overrides, relative to this one's folder."


def schema() -> dict[str, Any]:
    """The schema, with what installed packages bring. A file that extends another need not have what that one has."""
    found = file_of(every_stage()).model_json_schema(by_alias=True)
    required = found.pop("required")
    stages = found["properties"]["stages"]["additionalProperties"]
    # A stage that is laid over another's need not repeat its kind.
    found["properties"]["stages"]["additionalProperties"] = {
        "if": {"type": "object", "required": ["kind"]},
        "then": stages,
        "else": {"type": ["object", "null"]},
    }
    found["properties"]["extends"] = {"type": "string", "description": EXTENDS}
    found |= {
        "$schema": _DIALECT,
        "title": "A pipeline file of orchestrator",
        "if": {"required": ["extends"]},
        "else": {
            "required": required,
            "properties": {"stages": {"additionalProperties": {"required": ["kind"]}}},
        },
    }
    return found


def schema_text() -> str:
    """The schema as the file that is shipped."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
