"""Every key of a pipeline file, from the schema: `python -m orchestrator.reference.page > docs/reference.md`."""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from orchestrator.config.elastic import EVERY_DEVICE
from orchestrator.config.schema import Pipeline, StageSpec
from orchestrator.config.settings import Strict
from orchestrator.installed import until_registered
from orchestrator.reference.json_schema import EXTENDS
from orchestrator.stages import AnyStage
from orchestrator.stages.base import Stage, TrainStage
from orchestrator.stages.registry import every_stage, file_of, kind_of

_HEAD = """# Every key of a pipeline file

This page is generated from the schema by `python -m orchestrator.reference.page > docs/reference.md`. The column
"again" says whether stages run again when the key changes: **yes** if the key changes their results, **no** if it only
changes how they run. Where a default was published, or differs from what was published, its sentence names the paper or
the code. The other defaults are this project's own choice.
"""
_NAMES = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    type(None): "null",
}
_SHARED = (StageSpec, TrainStage)


@dataclass(frozen=True)
class Key:
    """What there is to say of one key.

    Attributes:
        name: as it stands in a file.
        type: what it may hold, in Markdown.
        default: in YAML between backticks, or a word.
        again: whether stages run again when it changes.
        meaning: its description.
    """

    name: str
    type: str
    default: str
    again: bool
    meaning: str


# In no model: it is gone once its file is laid over the other one.
EXTENDS_KEY = Key("extends", "path", "–", True, EXTENDS)
# Of the file itself, and in no stage's key.
_NAMED = "name"


def reference() -> str:
    """The document, in Markdown."""
    pipeline, stages = Pipeline[AnyStage], get_args(get_args(AnyStage)[0])
    parts = [_HEAD, "## The file", _table(pipeline, pipeline.model_fields) + "\n" + _row(EXTENDS_KEY)]
    parts += ["## Every stage", _table(StageSpec, StageSpec.model_fields)]
    own = {
        name: field for name, field in TrainStage.model_fields.items() if name not in StageSpec.model_fields
    }
    parts += ["## Every stage that trains", _table(TrainStage, own)]
    for stage in stages:
        shared = TrainStage if issubclass(stage, TrainStage) else StageSpec
        own = {name: field for name, field in stage.model_fields.items() if name not in shared.model_fields}
        parts += [f"## `kind: {kind_of(stage)}`", prose(stage), _table(stage, own)]
    parts += ["## Sections", "The sections that the tables above link to."]
    for model in sorted(sections(), key=lambda each: each.__name__):
        parts += [f"### {model.__name__}", prose(model), _table(model, model.model_fields)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def sections() -> list[type[BaseModel]]:
    """Every model that a key of a pipeline file may hold, but for the file itself and the stages."""
    found = [model for model in _reached(operational=True) if not issubclass(model, Stage)]
    return sorted(found, key=lambda model: model.__name__)


@until_registered
def _reached(*, operational: bool, extended: bool = False) -> frozenset[type[BaseModel]]:
    """The models that keys hold, at any depth.

    Args:
        operational: whether what only operational keys hold is among them.
        extended: whether stage kinds of installed packages are.
    """
    found: set[type[BaseModel]] = set()
    waiting: list[type[BaseModel]] = [file_of(every_stage() if extended else AnyStage)]
    while waiting:
        for field in waiting.pop().model_fields.values():
            new = set(models_in(field.annotation)) - found
            if operational or not _operational(field):
                found |= new
                waiting += new
    return frozenset(found)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation is made of."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def prose(model: type[BaseModel]) -> str:
    """What the class says of itself, but for its attributes and for what a base class says."""
    text = inspect.cleandoc(model.__dict__.get("__doc__") or "")
    text = text.partition("\n\nAttributes:")[0].replace("``", "`")
    # Names with a role, such as :meth:`apply`, are for readers of the code.
    return re.sub(r":\w+:`", "`", text)


def _table(model: type[BaseModel], fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | type | default | again | meaning |", "|---|---|---|---|---|"]
    for key in described(model):
        if not any(key.name == (field.alias or name) for name, field in fields.items()):
            continue
        rows.append(_row(key))
    return "\n".join(rows)


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", key.type, key.default, "yes" if key.again else "no", key.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@until_registered
def described(model: type[BaseModel]) -> Sequence[Key]:
    """The keys of a section, in the schema's order."""
    decides = {Pipeline[AnyStage], *_SHARED, *_reached(operational=False, extended=True)}
    decides.add(file_of(every_stage()))
    return [
        Key(
            field.alias or name,
            _type(field.annotation, field.metadata),
            _default(model, name, field),
            model in decides
            and not _operational(field)
            and not (issubclass(model, Pipeline) and name == _NAMED),
            _meaning(model, name),
        )
        for name, field in model.model_fields.items()
        if not _fixed(field)
    ]


def _meaning(model: type[BaseModel], name: str) -> str:
    """A field's description, or that of the base class's field that it narrows, as kinds of stages do with `kind`."""
    fields = (base.model_fields.get(name) for base in model.__mro__ if issubclass(base, BaseModel))
    return next((field.description for field in fields if field is not None and field.description), "")


def _fixed(field: FieldInfo) -> bool:
    """A key of a base class that this one has no use for: it takes nothing but its default."""
    return field.annotation in (type(None), tuple[()])


def _operational(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))


def _default(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return "–"
    if isinstance(value, Strict):
        said = value.model_dump(mode="json", exclude_defaults=True, by_alias=True)
        return f"`{_yaml(said)}`" if value.model_fields_set else "see there"
    if value in ((), {}):
        return "none"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """Short, in YAML's flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    return str(value)


def _type(annotation: Any, metadata: list[Any]) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    limits = _limits(metadata)
    if origin is Annotated:
        return _type(parts[0], [*parts[1:], *metadata])
    if isinstance(annotation, FieldInfo):
        return limits
    if origin in (Union, types.UnionType):
        given = [part for part in parts if part is not type(None)]
        return " or ".join(_type(part, []) for part in given) + limits
    if origin is Literal:
        return ", ".join(f"`{_yaml(part)}`" for part in parts)
    if origin is tuple:
        if len(parts) == 2 and parts[1] is Ellipsis:
            return f"list of {_type(parts[0], [])}"
        return f"list of {len(parts)}: {', '.join(dict.fromkeys(_type(part, []) for part in parts))}" + limits
    if origin is dict:
        values = _type(parts[1], [])
        return "mapping" if values == "mapping" else f"mapping of name to {values}"
    if inspect.isclass(annotation) and issubclass(annotation, Stage):
        return f"`{kind_of(annotation)}`"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _NAMES.get(annotation, "mapping" if annotation is Any else str(annotation)) + limits


def _limits(metadata: list[Any]) -> str:
    """Bounds in symbols, those of nested fields too."""
    flat = [part for each in metadata for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
    said = []
    for bound in flat:
        for kind, symbol, name in (
            (annotated_types.Ge, "≥", "ge"),
            (annotated_types.Gt, ">", "gt"),
            (annotated_types.Le, "≤", "le"),
            (annotated_types.Lt, "<", "lt"),
        ):
            if isinstance(bound, kind):
                value = getattr(bound, name)
                said.append("" if value == EVERY_DEVICE else f"{symbol} {_yaml(value)}")
    text = ", ".join(filter(None, said))
    return f" {text}" if text else ""


if __name__ == "__main__":
    sys.stdout.write(reference())
