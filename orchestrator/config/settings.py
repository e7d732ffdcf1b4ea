"""What all sections of a pipeline file are made of: frozen pydantic models with finite, bounded numbers.

Fields made with :func:`operational` say *how* something runs (worker counts, checkpoint intervals), never
*what* comes out. They are left out of a stage's key, so changing one re-runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

# Where a field of a config says no bounds of its own. Counts fit into 32 bits, other whole
# numbers into 64, and fractions into float32.
MAX_COUNT = 2**31 - 1
MAX_WIDTH = 2**20
MAX_DEPTH = 4096
_INT_RANGE = (-(2**63), 2**63 - 1)
_FLOAT_RANGE = (-1e30, 1e30)
_TRUE_OR_FALSE = ("true", "false", "yes", "no", "on", "off")
_EXPONENT = re.compile(r"[+-]?\d{1,20}(?:\.\d{0,20})?[eE][+-]?\d{1,3}")
# Of a number that is read; its field says that it is too large.
_DIGITS = 50


class _NoBoolean:
    """Refuses booleans where numbers belong: Python's are integers, so pydantic takes them for 0 and 1.

    YAML 1.1 takes 1e3 for a text. pydantic makes a number of it where a fraction belongs; here it is done for integers.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, bool):
            return _whole(value) if self._schema["type"] == "int" and isinstance(value, str) else value
        match self._schema["type"]:
            case "int":
                raise PydanticKnownError("int_type")
            case "float":
                raise PydanticKnownError("float_type")
        expected = " or ".join(map(str, self._schema["expected"]))
        raise PydanticKnownError("literal_error", {"expected": expected})


class _OnlyBoolean:
    """Takes YAML's words for true and false only: pydantic takes numbers and letters, too."""

    def __call__(self, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, str) and value.lower() in _TRUE_OR_FALSE):
            return value
        raise PydanticKnownError("bool_type")


def _whole(text: str) -> int | str:
    """The integer that a text such as 1e3 or 2.5e3 is; the text itself if it is none."""
    if not _EXPONENT.fullmatch(text):
        return text
    number = Decimal(text)
    return int(number) if number.adjusted() < _DIGITS and number == number.to_integral_value() else text


def _takes_numbers(schema: Mapping[str, Any]) -> bool:
    if schema.get("type") == "literal":
        kinds = set(map(type, schema["expected"]))
        return bool(kinds & {int, float}) and bool not in kinds
    return schema.get("type") in ("int", "float")


def _bound(schema: Any) -> None:
    """Give every number below a core schema the bounds that it does not have, and refuse booleans; in place."""
    if isinstance(schema, (list, tuple)):
        for item in schema:
            _bound(item)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "function-before" and isinstance(
        schema["function"]["function"], (_NoBoolean, _OnlyBoolean)
    ):
        return  # in a section that had its turn
    if schema.get("type") == "bool":
        boolean: Any = dict(schema)
        schema.clear()
        schema.update(core_schema.no_info_before_validator_function(_OnlyBoolean(), boolean))
        return
    if schema.get("type") in ("int", "float"):
        if schema["type"] == "float":
            schema["allow_inf_nan"] = False
        low, high = _INT_RANGE if schema["type"] == "int" else _FLOAT_RANGE
        lowest: Any = schema.get("ge", schema.get("gt", -1))
        if schema["type"] == "int" and lowest >= 0:
            high = MAX_COUNT
        if "ge" not in schema and "gt" not in schema:
            schema["ge"] = low
        if "le" not in schema and "lt" not in schema:
            schema["le"] = high
    if _takes_numbers(schema):
        inside: Any = dict(schema)
        schema.clear()
        schema.update(core_schema.no_info_before_validator_function(_NoBoolean(inside), inside))
        return
    for name, inner in schema.items():
        # What is in `metadata` or a default is not a schema.
        if name in (
            "schema",
            "fields",
            "items_schema",
            "choices",
            "keys_schema",
            "values_schema",
            "definitions",
        ):
            _bound(
                list(inner.values()) if name in ("fields", "choices") and isinstance(inner, dict) else inner
            )


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def identity(self) -> dict[str, Any]:
        """What decides the result: every field that is not operational, as plain JSON types, recursively."""
        identity: dict[str, Any] = _identity(self)
        return identity


class Settings(Strict):
    """What users write: every number in it, at any depth, is finite and has bounds, its field's own or these here.

    `true` and `false` are not numbers, nor are numbers `true` and `false`.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The model's schema, with bounds for every number in it, and without booleans for numbers or the other way."""
        schema = handler(source)
        _bound(schema)
        return schema


def with_new_keys(values: Any, renamed: Mapping[str, str]) -> Any:
    """The values of a section whose keys may have names of before; `load` says so once.

    Raises:
        ValueError: a key stands there twice, by its old name and by its new one.
    """
    if not isinstance(values, Mapping):
        return values
    found = dict(values)
    for old, new in renamed.items():
        if old in found:
            if new in found:
                raise ValueError(f"{old} is the old name of {new}: leave it out")
            found[new] = found.pop(old)
    return found


def operational(default: Any, **kwargs: Any) -> Any:
    """A pydantic field that changes how a stage runs and never what it produces."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


def in_key_if_set(default: Any, **kwargs: Any) -> Any:
    """A pydantic field that came later: with its default, results and keys are those from before it was there."""
    return Field(default, json_schema_extra={"in_key_if_set": True}, **kwargs)


def only_one(subject: str, places: Mapping[str, object]) -> str:
    """The name of the one key that is given, of several that exclude each other.

    Args:
        subject: and verb of the message: `a student is`.
        places: the keys' values by name; None is not given.

    Raises:
        ValueError: none is given, or more than one.
    """
    given = [name for name, value in places.items() if value is not None]
    if len(given) != 1:
        what = f"it has {' and '.join(given)}" if given else "it has none of them"
        raise ValueError(f"{subject} exactly one of {', '.join(places)}: {what}")
    return given[0]


def _identity(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {
            name: _identity(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if _decides(field, getattr(value, name))
        }
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _decides(field: FieldInfo, value: Any) -> bool:
    """Whether a field with this value has a part in what comes out."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return not extra.get("operational") and not (extra.get("in_key_if_set") and value == field.default)
