"""A JSON file as a checked, frozen model; every mistake in it is one UserError with its line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.errors import UserError, nearest
from orchestrator.fsio import open_regular, why

# Years of spot prices are a few megabytes.
_MAX_BYTES = 16 << 20

M = TypeVar("M", bound=BaseModel)
Keys = Sequence[str | int]


class JsonFile:
    """The values of a JSON file that can say where they were written.

    Args:
        path: the file.
        what: it is, for messages: `trace`, `costs file`.

    Raises:
        UserError: no such file, too large, not UTF-8, or not JSON; names the line.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._text = self._read()
        try:
            self.data: Any = json.loads(self._text, parse_constant=_refuse)
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}:{error.colno}"
            raise UserError(f"the {what} is not JSON: {error.msg.lower()}", where=where) from None
        except ValueError as error:
            raise UserError(f"the {what} is not JSON: {error}", where=str(path)) from None
        except RecursionError:
            raise UserError(f"the {what} is nested too deeply", where=str(path)) from None
        if "\\ud" in self._text.lower() and not _is_text(self.data):
            raise UserError(f"the {what} contains an unpaired surrogate, such as \\ud800", where=str(path))

    def where(self, keys: Keys = ()) -> str:
        """`file:line  a.b[3]` of the value at `keys`, or of the nearest value around it."""
        dotted = ""
        for key in keys:
            dotted += f"[{key}]" if isinstance(key, int) else f"{'.' if dotted else ''}{key}"
        return f"{self.path}:{self._line(keys)}  {dotted}".rstrip()

    def parse(self, model: type[M]) -> M:
        """The whole file as a `model`.

        Raises:
            UserError: what does not fit, all of it in one.
        """
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            # A union complains once for each member; the first is the one most likely meant.
            found = {self._keys(item["loc"]): item for item in reversed(error.errors())}
            validation_errors = [self._complaint(model, keys, found[keys]) for keys in list(found)[:-11:-1]]
        if len(validation_errors) == 1:
            raise validation_errors[0]
        raise UserError("\n".join(str(complaint) for complaint in validation_errors))

    def _read(self) -> str:
        try:
            with open_regular(self.path) as file:
                data = file.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise UserError(f"the {self.what} is larger than {_MAX_BYTES:,} bytes", where=str(self.path))
            return data.decode("utf-8")
        except FileNotFoundError:
            folder = self.path.parent
            close = nearest(self.path.name, [item.name for item in folder.glob("*.json")])
            hint = f"did you mean {folder / close}?" if close else "check the path"
            raise UserError(f"no such {self.what}", where=str(self.path), hint=hint) from None
        except UnicodeDecodeError as error:
            where = f"{self.path}, byte {error.start}"
            raise UserError(f"the {self.what} is not UTF-8 text", where=where) from None
        except OSError as error:
            raise UserError(f"cannot read the {self.what}: {why(error)}", where=str(self.path)) from None

    def _line(self, keys: Keys) -> int:
        # Lines are looked up only to complain: JSON is YAML, and the YAML parser knows them but is slow.
        try:
            node = yaml.compose(self._text, Loader=yaml.CSafeLoader)
        except (yaml.YAMLError, RecursionError, ValueError):
            # But for some control characters and depths, which YAML has no place for.
            return 1
        line = 1
        for key in keys:
            child: yaml.Node | None = None
            if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                child = node.value[key]
                line = child.start_mark.line + 1
            elif isinstance(node, yaml.MappingNode):
                for name, value in node.value:
                    if name.value == str(key):
                        child, line = value, name.start_mark.line + 1
            if child is None:
                break
            node = child
        return line

    def _keys(self, loc: Keys) -> tuple[str | int, ...]:
        """Where in the file: `loc` without the names of unions' members that pydantic mixes in."""
        keys: list[str | int] = []
        value = self.data
        for key in loc:
            if isinstance(value, list) and isinstance(key, int):
                value = value[key] if key < len(value) else None
            elif isinstance(value, dict):
                value = value.get(key, value)
            else:
                continue
            keys.append(key)
        return tuple(keys)

    def _complaint(self, model: type[BaseModel], keys: Keys, item: Any) -> UserError:
        name, hint = keys[-1] if keys else "", None
        if item["type"] == "extra_forbidden":
            close = nearest(str(name), _names_beside(model, keys))
            what = f"unknown key {name!r}"
            hint = f"did you mean {close!r}?" if close else "remove it"
        elif item["type"] == "missing":
            what = f"the key {name!r} is missing"
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            joined = message if item["type"] == "value_error" else f"must be {message}"
            what = f"{name}: {joined}, not {str(item['input'])[:60]}"
        return UserError(what, where=self.where(keys), hint=hint)


def _is_text(data: Any) -> bool:
    """Whether all texts in it are whole characters; JSON can write halves of them."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _names_beside(model: type[BaseModel], keys: Keys) -> list[str]:
    """Fields of the model that the unknown key's mapping is read into; of all nested models if in doubt."""
    names: list[str] = []
    pending: list[type[BaseModel]] = [model]
    seen: set[type[BaseModel]] = set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        names += current.model_fields
        for field in current.model_fields.values():
            pending += _models_in(field.annotation)
    return names if len(keys) > 1 else list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
