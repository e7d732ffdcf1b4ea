"""What one key of a pipeline file means: `orchestrator explain stages.pretrain.homogeneous`."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from orchestrator.errors import UserError, nearest
from orchestrator.reference.page import EXTENDS_KEY, Key, described, models_in, prose
from orchestrator.stages.base import Stage
from orchestrator.stages.registry import every_stage, file_of, kind_of, kinds_of

_STAGES = "stages"
# What stands for a name that the user gives.
_NAME = "NAME"
_FIRST_SENTENCE = re.compile(r"(?:\([^()]*\)|[^.;:(]|[.;:](?=\S)|\()*")


@dataclass(frozen=True)
class Explanation:
    """A key, and what can stand below it.

    Attributes:
        paths: of the key, from the top of the file: several if it means the same in each; empty for the file itself.
        key: what there is to say of it; None for the file, for a stage of a kind, and for a section below a name.
        prose: what its section says of itself, if it is one.
        below: the keys of its section, or the names that may follow.
    """

    paths: Sequence[str]
    key: Key | None
    prose: str
    below: Sequence[Key]


def explain(path: str) -> list[Explanation]:
    """What is at a dotted path; a stage is named by its kind, and any name will do for a student or a dataset.

    Below any other name of a stage, a key is explained for each kind that has it.

    A path that starts at a stage kind, or that is the end of others, is found, too: `lr` gives each place that has
    one.

    Raises:
        UserError: there is no such key.
    """
    parts = [part for part in path.split(".") if part]
    if not parts:
        return [_section((), _file())]
    if parts[0] not in _names(_file()):
        if parts[0] in _kinds():
            parts = [_STAGES, *parts]
        elif found := [where for where in _everywhere() if where[-len(parts) :] == tuple(parts)]:
            return _together([_at(where) for where in found])
    if parts[0] == _STAGES and len(parts) > 2 and parts[1] not in _kinds():
        return _of_any_kind(parts)
    return [_at(parts)]


def _of_any_kind(parts: Sequence[str]) -> list[Explanation]:
    """What a key means below a stage's own name, which does not tell its kind: for each kind that has the key."""
    paths = [[_STAGES, kind, *parts[2:]] for kind in _kinds()]
    found = []
    for path in paths:
        with contextlib.suppress(UserError):
            found.append(_at(path))
    return _together(found) if found else [_at(parts)]


def _together(explanations: Sequence[Explanation]) -> list[Explanation]:
    """Those that say the same as one."""
    groups: list[Explanation] = []
    for each in explanations:
        for number, group in enumerate(groups):
            if replace(group, paths=()) == replace(each, paths=()):
                groups[number] = replace(group, paths=[*group.paths, *each.paths])
                break
        else:
            groups.append(each)
    return groups


def text(explanation: Explanation, width: int = 100) -> str:
    """The explanation as it is printed, on lines of up to `width` characters."""
    lines = list(explanation.paths) or ["A pipeline file"]
    if key := explanation.key:
        again = "stages run again" if key.again else "no stage runs again"
        # Where what happens without the key is not a value, its description says it.
        default = "" if key.default == "–" and "Default:" in key.meaning else _told_default(key.default)
        said = (_plain(key.type), default, f"when it changes, {again}")
        lines += [*_wrapped("; ".join(filter(None, said)), width), "", *_wrapped(_plain(key.meaning), width)]
    if explanation.prose:
        lines += ["", *_wrapped(_plain(explanation.prose), width)]
    if explanation.below:
        lines += ["", "  keys:"]
        longest = max(len(key.name) for key in explanation.below)
        for key in explanation.below:
            lines += textwrap.wrap(
                _plain(_first_sentence(key.meaning)),
                width,
                initial_indent=f"    {key.name.ljust(longest)}  ",
                subsequent_indent=" " * (longest + 6),
            )
    return "\n".join(lines)


def _told_default(default: str) -> str:
    if default == "**required**":
        return "required"
    if default == "see there":
        return ""
    return "no default" if default == "–" else f"default {_plain(default)}"


def _wrapped(prose: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in prose.split("\n\n"):
        lines += ["", *textwrap.wrap(paragraph, width, initial_indent="  ", subsequent_indent="  ")]
    return lines[1:]


def _first_sentence(meaning: str) -> str:
    """Up to the first full stop, semicolon or colon that is not inside parentheses, as those of a default's source."""
    found = _FIRST_SENTENCE.match(meaning)
    assert found is not None, "it matches any text"
    return found[0]


def _plain(markdown: str) -> str:
    """Without links, which a terminal does not follow, and without the backticks of single values."""
    return re.sub(r"\[([^\]]+)\]\(#[^)]*\)", r"\1", markdown).replace("**", "").replace("`", "")


# --- the walk -----------------------------------------------------------------------------------------------------


def _at(parts: Sequence[str]) -> Explanation:
    return _from(_file(), list(parts), [])


def _from(model: type[BaseModel], waiting: list[str], done: list[str]) -> Explanation:
    """What is at `waiting` below a section; of several sections that a key may hold, in the first that has it."""
    name, *waiting = waiting
    key = _key(model, name, done)
    done = [*done, name]
    below, named = _below(model, name), _by_name(model, name)
    if named and waiting:
        # A name of the user's own; of a stage it is the kind.
        given, *waiting = waiting
        done.append(given)
        if below and issubclass(below[0], Stage):
            below = [_stage(given, done)]
        if not waiting:
            return _section(done, below[0]) if below else Explanation([".".join(done)], key, "", ())
    if not waiting:
        return _explained(done, key, below, named=named)
    if not below:
        raise UserError(f"{'.'.join(done)} has no keys below it", hint=f"it is {_plain(key.type)}")
    *others, last = [each for each in below if waiting[0] in _names(each)] or below[:1]
    for section in others:
        with contextlib.suppress(UserError):
            return _from(section, waiting, done)
    return _from(last, waiting, done)


def _explained(
    path: Sequence[str], key: Key, below: Sequence[type[BaseModel]], *, named: bool
) -> Explanation:
    dotted = [".".join(path)]
    if named and below and issubclass(below[0], Stage):
        kinds = [Key(kind, "", "", True, prose(stage)) for kind, stage in _kinds().items()]
        return Explanation(dotted, key, "A stage of any name; its kind is one of these:", kinds)
    if not below:
        return Explanation(dotted, key, "", ())
    return Explanation(dotted, key, prose(below[0]), _keys(below[0]))


def _section(path: Sequence[str], model: type[BaseModel]) -> Explanation:
    return Explanation([".".join(path)] if path else [], None, prose(model), _keys(model))


def _key(model: type[BaseModel], name: str, above: Sequence[str]) -> Key:
    for key in _keys(model):
        if key.name == name:
            return key
    known = _names(model)
    if new := getattr(model, "renamed", {}).get(name):
        hint = f"it is now called {'.'.join([*above, new])!r}"
    else:
        close = nearest(name, known)
        hint = f"did you mean {'.'.join([*above, close])!r}?" if close else f"there are: {', '.join(known)}"
    where = ".".join(above) or "a pipeline file"
    raise UserError(f"{where} has no key {name!r}", hint=hint)


def _stage(kind: str, path: Sequence[str]) -> type[BaseModel]:
    kinds = _kinds()
    if kind in kinds:
        return kinds[kind]
    close = nearest(kind, kinds)
    hint = f"did you mean {'.'.join([*path[:-1], close])!r}?" if close else f"there are: {', '.join(kinds)}"
    raise UserError(f"there is no stage kind {kind!r}; here, a stage is named by its kind", hint=hint)


def _file() -> type[BaseModel]:
    """A pipeline file with every stage kind that is installed."""
    return file_of(every_stage())


def _kinds() -> dict[str, type[Stage]]:
    return kinds_of(every_stage())


def _keys(model: type[BaseModel]) -> Sequence[Key]:
    """The keys of a section."""
    return (*described(model), EXTENDS_KEY) if model is _file() else described(model)


def _names(model: type[BaseModel]) -> list[str]:
    return [key.name for key in _keys(model)]


def _annotation(model: type[BaseModel], name: str) -> Any:
    fields = model.model_fields.items()
    return next((field.annotation for own, field in fields if (field.alias or own) == name), None)


def _below(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    return list(dict.fromkeys(models_in(_annotation(model, name))))


def _by_name(model: type[BaseModel], name: str) -> bool:
    """Whether names of the user's own come below the key."""
    annotation = _annotation(model, name)
    options = (annotation, *get_args(annotation))
    return any(get_origin(option) is dict for option in options) and bool(_below(model, name))


def _everywhere() -> Iterator[tuple[str, ...]]:
    """The path of every key, a student or a dataset standing as NAME."""

    def walk(model: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name in _names(model):
            path = (*above, name)
            yield path
            for below in _below(model, name):
                if issubclass(below, Stage):
                    yield from walk(below, (*path, kind_of(below)))
                elif below is not model:
                    yield from walk(below, (*path, _NAME) if _by_name(model, name) else path)

    yield from walk(_file(), ())
