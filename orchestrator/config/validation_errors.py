"""Pydantic's validation errors as errors that a user can act on: line, key path, value, nearest right name."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator import installed
from orchestrator.config.extension import Extension
from orchestrator.config.private_values import is_private
from orchestrator.config.yaml_source import Document, KeyPath, lookup, show
from orchestrator.errors import KeyMistakeError, UserError, nearest, shortened

_PREFIXES = {
    "Value error, ": "",
    "Assertion failed, ": "",
    "Input should be ": "must be ",
    "String should ": "must ",
}
# Keys that tell the members of a union apart: stages by `kind`, tasks by `type`.
_TAGS = ("kind", "type")
_QUOTED = re.compile(r"'([^']*)'")


def validation_errors(error: ValidationError, document: Document, model: type[BaseModel]) -> list[UserError]:
    """One UserError for every key that is wrong, in the order of the file.

    A plain union reports once per member; those reports are merged into one error.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors():
        if _follows(details):
            continue
        by_path.setdefault(_real_path(details, document.data), []).append(details)
    misspelt = _misspelt(by_path, document, model)
    ordered = sorted(by_path.keys() - misspelt, key=lambda path: (_line(path, document), str(path)))
    return [_error(path, by_path[path], document, model) for path in ordered]


def _follows(details: ErrorDetails) -> bool:
    """Whether a list is only too short because of items that are wrong, which have errors of their own."""
    given = details["input"]
    is_list = details["type"] == "too_short" and isinstance(given, (list, tuple))
    return is_list and len(given) >= details.get("ctx", {}).get("min_length", 0)


def _misspelt(
    by_path: dict[KeyPath, list[ErrorDetails]], document: Document, model: type[BaseModel]
) -> set[KeyPath]:
    """Missing keys that are there, misspelt: the error about the unknown key says it all."""
    unknown = [path for path, group in by_path.items() if group[0]["type"] == "extra_forbidden"]
    meant = {
        (*path[:-1], nearest(str(path[-1]), _field_names(model, path[:-1], document.data)))
        for path in unknown
    }
    return {path for path, group in by_path.items() if group[0]["type"] == "missing" and path in meant}


def _line(path: KeyPath, document: Document) -> int:
    for length in range(len(path), -1, -1):
        if path[:length] in document.lines:
            return document.lines[path[:length]]
    return 0


def _real_path(details: ErrorDetails, data: Any) -> KeyPath:
    """The key path in the file: `loc` without the union tags and member names that pydantic mixes in."""
    loc = list(details["loc"])
    if len(loc) > 2 and loc[0] == "stages" and loc[2] == lookup(data, (*loc[:2], "kind"))[0]:
        del loc[2]  # the discriminator's tag
    path: list[str | int] = []
    for position, part in enumerate(loc):
        is_last = position == len(loc) - 1
        if lookup(data, [*path, part])[1] or (is_last and details["type"] == "missing"):
            path.append(part)
    return tuple(path)


def _error(path: KeyPath, group: list[ErrorDetails], document: Document, model: type[BaseModel]) -> UserError:
    first = group[0]
    name = shortened(str(path[-1]), 80) if path else ""
    owner = _owner(path, document)
    candidates = _field_names(model, path[:-1], document.data)
    if first["type"] == "extra_forbidden":
        close = nearest(name, candidates)
        hint = f"did you mean {close!r}?" if close else f"{owner} takes: {', '.join(sorted(candidates))}"
        # What is below may be a secret that belongs elsewhere.
        where = document.where(path, value=False)
        return UserError(f"unknown key {name!r} in {owner}", where=where, hint=hint)
    if first["type"] == "missing":
        hint = f"add `{name}: …`"
        return UserError(f"{owner} is missing the key {name!r}", where=document.where(path), hint=hint)
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return _bad_kind(path, first, document, model)
    return _bad_value(path, group, document, model)


def _bad_kind(path: KeyPath, details: ErrorDetails, document: Document, model: type[BaseModel]) -> UserError:
    context = details.get("ctx", {})
    field = str(context.get("discriminator", "'kind'")).strip("'")
    kinds = _kinds(model, path, field)
    owner = _owner((*path, field), document)
    if details["type"] == "union_tag_not_found":
        where = document.where(path, value=False)
        return UserError(
            f"{owner} is missing the key {field!r}", where=where, hint=_hint_kind(path, field, kinds)
        )
    given = shortened(str(context.get("tag", "")), 80)
    close = nearest(given, kinds)
    hint = f"did you mean {close!r}?" if close else f"one of: {', '.join(kinds)}"
    what = f"{owner} has the unknown {field} {given!r}"
    return UserError(what, where=document.where((*path, field)), hint=hint)


def _hint_kind(path: KeyPath, field: str, kinds: list[str]) -> str:
    """A stage is often called what it is."""
    close = nearest(str(path[-1]), kinds) if path else None
    return f"add `{field}: {close}`" if close else f"add `{field}: …`, one of {', '.join(kinds)}"


def _bad_value(
    path: KeyPath, group: list[ErrorDetails], document: Document, model: type[BaseModel]
) -> UserError:
    for details in group:
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            return UserError(cause.what, where=document.where(path), hint=cause.hint)
        if isinstance(cause, KeyMistakeError):
            name = shortened(".".join(str(part) for part in path), 200)
            where = document.where((*path, *cause.key.split(".")))
            return UserError(f"{name}: {cause.what}", where=where, hint=cause.hint)
    value, known = lookup(document.data, path)
    allowed: list[str] = []
    messages: list[str] = []
    for details in group:
        if details["type"] in ("literal_error", "enum"):
            allowed += _QUOTED.findall(str(details.get("ctx", {}).get("expected", "")))
        message = _message(details)
        if message not in messages:
            messages.append(message)
    close = nearest(str(value), allowed) if known and isinstance(value, str) else None
    name = shortened(".".join(str(part) for part in path), 200) or document.what
    what = f"{name}: {'; or '.join(messages)}"
    if known and not is_private(path) and group[0]["type"] not in ("value_error", "assertion_error"):
        what += f", not {show(value)}"
    hint = f"did you mean {close!r}?" if close else None
    if known and value is None:
        what = f"{name}: null is not a value here: it {' or '.join(message for message in messages)}"
        hint = _hint_null(path, model, document)
    elif any(details["type"] == "bool_type" for details in group) and value in (0, 1):
        hint = f"write {str(bool(value)).lower()}"
    elif isinstance(value, bool) and any(details["type"] in ("int_type", "float_type") for details in group):
        hint = f"write {int(value)} if you mean that number"
    elif path and _is_number(value) and "peak" in _field_names(model, path, document.data):
        hint = f"write `{path[-1]}: {{peak: {show(value)}}}`"
    return UserError(what, where=document.where(path), hint=hint)


def _hint_null(path: KeyPath, model: type[BaseModel], document: Document) -> str:
    """What to write instead of nothing."""
    for section in _models_at(model, path[:-1], document.data):
        for name, field in section.model_fields.items():
            if (field.alias or name) != str(path[-1]) or field.is_required():
                continue
            default = field.get_default(call_default_factory=True, validated_data={})
            shown = "" if isinstance(default, BaseModel) or not default else f", {show(default)}"
            return f"leave the key out for its default{shown}"
    return "give it a value, or leave the key out"


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or one that YAML takes for text, such as 1e-3."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _message(details: ErrorDetails) -> str:
    """Pydantic's message in the words of the file: what the value must be."""
    if details["type"] in ("path_type", "path_error"):
        return "must be a path"
    message = shortened(details["msg"], 300)
    for prefix, instead in _PREFIXES.items():
        if message.startswith(prefix):
            message = instead + message.removeprefix(prefix)
            break
    message = message.replace("a valid boolean", "true or false")
    message = message.replace("a valid ", "a ").replace("a integer", "an integer")
    message = re.sub(r"^\w+ should have at (least|most) (\d+ items?).*", r"must have at \1 \2", message)
    message = re.sub(r", (unable to parse|got a number|unable to interpret).*", "", message)
    message = re.sub(
        r"a dictionary or (instance of \w+|object to extract fields from)", "a mapping of keys", message
    )
    message = message.replace("a dictionary", "a mapping of keys").replace("a tuple", "a list")
    return message[:1].lower() + message[1:] if message[:2].istitle() else message


def _owner(path: KeyPath, document: Document) -> str:
    """Who holds the last key of `path`, in words."""
    parents = path[:-1]
    if not parents:
        return document.what
    if parents[0] in ("stages", "data") and len(parents) >= 2:
        what = f"{'stage' if parents[0] == 'stages' else 'dataset'} {str(parents[1])!r}"
        inner = ".".join(str(part) for part in parents[2:])
        return f"{what}, {inner}" if inner else what
    return f"section {'.'.join(str(part) for part in parents)!r}"


def _field_names(model: type[BaseModel], path: KeyPath, data: Any) -> set[str]:
    """Every key that may stand below `path`."""
    models = _models_at(model, path, data)
    return {field.alias or name for item in models for name, field in item.model_fields.items()}


def _tags(model: type[BaseModel], path: KeyPath, field: str) -> list[str]:
    """Every value that the discriminator `field` may have at `path`."""
    members = [item for item in _models_at(model, path, None) if field in item.model_fields]
    return [str(tag) for item in members for tag in get_args(item.model_fields[field].annotation)]


def _kinds(model: type[BaseModel], path: KeyPath, field: str) -> list[str]:
    """Every kind that a stage may have: ours, and those of installed packages, which are not imported for it."""
    kinds = _tags(model, path, field)
    is_stage = len(path) == 2 and path[0] == "stages"
    return list(dict.fromkeys([*kinds, *(installed.names("stages") if is_stage else ())]))


def _models_at(model: type[BaseModel], path: KeyPath, data: Any) -> list[type[BaseModel]]:
    """The models that may stand at `path`; `data` tells the members of a union apart."""
    types_here: list[Any] = [model]
    for depth, part in enumerate(path):
        types_here = [inner for item in types_here for inner in _below(item, part)]
        types_here = _narrow(types_here, lookup(data, path[: depth + 1])[0])
    return [item for item in types_here if _is_model(item)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _narrow(candidates: list[Any], value: Any) -> list[Any]:
    """Of a discriminated union keep the member whose Literal `kind` or `type` is the one written."""
    candidates = [_chosen(item, value) for item in candidates]
    models = [item for item in candidates if _is_model(item)]
    if not isinstance(value, dict):
        return candidates
    matching = [
        item
        for item in models
        for tag in _TAGS
        if tag in item.model_fields and value.get(tag) in get_args(item.model_fields[tag].annotation)
    ]
    return matching or candidates


def _chosen(annotation: Any, value: Any) -> Any:
    """Of an extension the class that the value names, if there is one."""
    if not (_is_model(annotation) and issubclass(annotation, Extension)):
        return annotation
    try:
        return annotation.chosen(value)
    except UserError:
        return annotation


def _below(annotation: Any, part: str | int) -> Iterable[Any]:
    """The annotations one step below `annotation`, with unions and Annotated unwrapped."""
    if _is_model(annotation):
        # By what users write: `models` of `evaluate` is another name here.
        fields = (field for name, field in annotation.model_fields.items() if (field.alias or name) == part)
        return [member for field in fields for member in _members(field.annotation)]
    arguments = get_args(annotation)
    if get_origin(annotation) is dict and len(arguments) == 2:
        return _members(arguments[1])
    if get_origin(annotation) in (list, tuple) and arguments:
        return _members(arguments[0])
    return []


def _members(annotation: Any) -> list[Any]:
    if isinstance(annotation, TypeVar):
        return _members(annotation.__bound__)
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _members(member)]
    return [annotation]
