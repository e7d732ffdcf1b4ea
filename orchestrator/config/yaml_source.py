"""A YAML file as plain values that remember where each one was written."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.private_values import NO_NAME, is_private, is_private_text, without_secrets
from orchestrator.config.yaml_bounds import MAX_DEPTH, Loader, check_size
from orchestrator.errors import UserError, nearest, shortened
from orchestrator.fsio import open_regular, why

KeyPath = tuple[str | int, ...]

# Maps whose keys the user invents: an override may change an entry, but a new entry is more likely a typo.
_NAMED = ("stages", "data")

_EXTENDS = "extends"

# A pipeline file of hundreds of stages stays far below these; what is above would cost memory.
_MAX_BYTES = 1 << 20
_MAX_FILES = 20

# What Python quotes in its errors.
_QUOTED = re.compile(r"""'[^'<]{2,}'|"[^"<]{2,}\"""")


@dataclass
class Document:
    """Plain values, and for every key path the line or the override that wrote it.

    Attributes:
        path: the file.
        data: mappings, lists and scalars.
        lines: 1-based line of every key path.
        files: the file of every key path that another one wrote, which `path` extends.
        overrides: the command-line argument that wrote a key path.
        written: what a message shows in place of a value that was put into `data` since.
        what: it is, in messages.
    """

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    files: dict[KeyPath, Path] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)
    written: dict[KeyPath, Any] = field(default_factory=dict)
    what: str = "the pipeline"

    def where(self, path: KeyPath, *, value: bool = True) -> str:
        """`file:line  key.path = value`, by the nearest enclosing key path that was written down.

        Args:
            value: whether the value is shown, if it is not a secret; an override is shown with or without its own.
        """

        def override(written: str) -> str:
            shown = without_secrets(written)
            return shown if value or "=" not in shown else f"{shown.partition('=')[0]}=…"

        dotted = ".".join(str(part) for part in path)
        found, known = lookup(self.data, path)
        found = self.written.get(path, found)
        shown = dotted
        if value and known and not is_private(path) and not _is_container(found):
            shown = f"{dotted} = {show(found)}"
        inside = [name for name in self.overrides if path and name[: len(path)] == path]
        if inside and path not in self.lines:
            return f"command line `{override(self.overrides[inside[0]])}`  {shown}"
        for length in range(len(path), -1, -1):
            prefix = path[:length]
            if prefix in self.overrides:
                return f"command line `{override(self.overrides[prefix])}`  {shown}"
            if prefix in self.lines:
                file = self.files.get(prefix, self.path)
                return f"{file}:{self.lines[prefix]}  {shown}".rstrip()
        return f"{self.path}  {shown}".rstrip()

    def rename(self, section: KeyPath, old: str, new: str) -> None:
        """Call the key `old` of a mapping `new`, wherever it was written."""
        values, _ = lookup(self.data, section)
        values[new] = values.pop(old)
        path = (*section, old)
        records: tuple[dict[KeyPath, Any], ...] = (self.lines, self.files, self.overrides)
        for by_path in records:
            for known in [known for known in by_path if known[: len(path)] == path]:
                by_path[(*section, new, *known[len(path) :])] = by_path.pop(known)


def lookup(data: Any, path: Sequence[str | int]) -> tuple[Any, bool]:
    """The value at `path` and whether there is one."""
    for part in path:
        in_mapping = isinstance(data, Mapping) and part in data
        in_list = isinstance(data, list) and isinstance(part, int) and 0 <= part < len(data)
        if not (in_mapping or in_list):
            return None, False
        data = data[part]
    return data, True


def show(value: Any, limit: int = 80) -> str:
    """A value as the user could have written it, on one line."""
    if isinstance(value, str):
        text = value if value == value.strip() and "\n" not in value and _is_text(value) else repr(value)
    elif value is None:
        text = "(empty)"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(item, limit) for item in value) + "]"
    elif isinstance(value, Mapping):
        shown = {key: "…" if is_private((key,)) else show(item, limit) for key, item in value.items()}
        text = "{" + ", ".join(f"{key}: {item}" for key, item in shown.items()) + "}"
    else:
        text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_text(value: str) -> bool:
    """Whether a value without quotes is read as this text, and not as a number, true, false or null."""
    loader: Any = Loader("")
    kind: str = loader.resolve(yaml.ScalarNode, value, (True, False))
    return kind == "tag:yaml.org,2002:str"


def read(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Parse `path`, lay it over the file that it `extends` if any, and apply `key.path=value` overrides.

    Mappings are merged key by key, everything else is replaced; a key set to null takes the other file's away, and is
    null if that has none. The path of the other file is relative to this one's folder.

    Raises:
        UserError: no such file, not UTF-8, not YAML, a key written twice, a file that extends itself, or an
            override that fits nothing.
    """
    document = _extended(path, ())
    for override in overrides:
        _apply(document, override)
    return document


def json_document(path: Path, text: str, data: Any, what: str) -> Document:
    """The values of a JSON file with their lines: JSON is YAML, whose parser knows them.

    Args:
        path: the file.
        text: its content.
        data: its values.
        what: it is, in messages, such as `the trace`.
    """
    document = Document(path, data, {(): 1}, what=what)
    # But for some control characters, depths and repeated keys, which YAML has no place for: lines end there.
    with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError, UserError):
        if (node := yaml.compose(text, yaml.CSafeLoader)) is not None:
            _record(node, (), document, active=())
    return document


def _extended(path: Path, inside: tuple[Path, ...]) -> Document:
    if len(inside) >= _MAX_FILES:
        raise UserError(f"more than {_MAX_FILES} files extend each other", where=str(path))
    document = _parse(path)
    base = document.data.pop(_EXTENDS, None)
    if base is None:
        return document
    where = document.where((_EXTENDS,), value=False)
    if not isinstance(base, str):
        raise UserError(f"`{_EXTENDS}` is {show(base)}, not the path of a file", where=where)
    below = path.parent / base
    if below.resolve() in (path.resolve(), *inside):
        raise UserError("the file extends itself", where=where)
    if not below.exists():
        raise UserError(
            f"no such pipeline file: {below}", where=where, hint=f"paths are relative to {path.parent}"
        )
    return _laid_over(document, _extended(below, (*inside, path.resolve())))


def _laid_over(top: Document, below: Document) -> Document:
    """`top` over what it extends; every key path keeps the file and line that wrote it."""
    own = {key: line for key, line in top.lines.items() if key[:1] != (_EXTENDS,)}
    # What a list or a scalar of `top` replaces is no longer there, nor are its lines.
    replaced = {key for key in own if key and not isinstance(lookup(top.data, key)[0], Mapping)}
    kept = {
        key: line
        for key, line in below.lines.items()
        if key not in own and not any(key[:length] in replaced for length in range(1, len(key)))
    }
    files = {key: below.files.get(key, below.path) for key in kept}
    return Document(top.path, _merged(below.data, top.data), {**kept, **own}, files)


def _merged(below: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in top.items():
        if value is None and key in below:
            del result[key]
        elif isinstance(value, Mapping) and isinstance(below.get(key), Mapping):
            result[key] = _merged(below[key], value)
        else:
            result[key] = value
    return result


def _parse(path: Path) -> Document:
    text = read_text(path, "pipeline file", _MAX_BYTES, "*.y*ml")
    try:
        check_size(text, str(path))
        node = yaml.compose(text, Loader)
        if node is None:
            raise UserError(
                "the pipeline file is empty", where=str(path), hint="start with `name: my-pipeline`"
            )
        if not isinstance(node, yaml.MappingNode):
            raise UserError(
                "the pipeline file must be a mapping of keys to values",
                where=f"{path}:{node.start_mark.line + 1}",
                hint="start with `name: my-pipeline`",
            )
        document = Document(path, {}, {(): node.start_mark.line + 1})
        _record(node, (), document, active=())
        document.data = _constructed(node, str(path))
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error, is_private=is_private_text(text)) from None
    except yaml.YAMLError as error:
        raise UserError(f"not readable as YAML: {shortened(str(error), 200)}", where=str(path)) from None
    return document


def _constructed(node: yaml.Node, where: str) -> Any:
    """The node's value; what a constructor raises besides YAML's own errors is one UserError with the node's line."""
    loader = Loader("")
    try:
        return _plain(loader.construct_document(node))
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError, RecursionError) as error:
        # Python repeats the value, which may be a secret, in quotes.
        reason = "" if isinstance(error, KeyError) else shortened(_QUOTED.sub("…", str(error)), 200)
        raise UserError(
            f"a value cannot be read: {reason or type(error).__name__}",
            where=f"{where}:{_culprit(node)}",
            hint="put it in quotes if it is a text",
        ) from None
    finally:
        loader.dispose()


def _culprit(node: yaml.Node) -> int:
    """The line of the first scalar below `node` that cannot be built."""
    for scalar in _scalars(node):
        loader = Loader("")
        try:
            _plain(loader.construct_document(scalar))
        except Exception:  # whatever it is, this is the one
            return int(scalar.start_mark.line + 1)
        finally:
            loader.dispose()
    return int(node.start_mark.line + 1)


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            yield from _scalars(key)
            yield from _scalars(item)


def read_text(path: Path, what: str, max_bytes: int, others: str) -> str:
    """The text of a file that a user wrote.

    Args:
        path: the file.
        what: it is, for messages: `pipeline file`.
        max_bytes: a larger file is refused.
        others: the pattern of files of its kind, of which an error names the nearest.

    Raises:
        UserError: no such file, none that can be read, too large, or not UTF-8.
    """
    try:
        with open_regular(path) as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise UserError(f"the {what} is larger than {max_bytes:,} bytes", where=str(path))
        return data.decode("utf-8")
    except FileNotFoundError:
        beside = [item.name for item in path.parent.glob(others)] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        hint = f"did you mean {path.parent / close}?" if close else "check the path"
        raise UserError(f"no such {what}", where=str(path), hint=hint) from None
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} is not UTF-8 text", where=f"{path}, byte {error.start}") from None
    except OSError as error:
        raise UserError(f"cannot read the {what}: {why(error)}", where=str(path)) from None
    except ValueError:  # a NUL in its name
        raise UserError(f"no such {what}", where=str(path), hint="check the path") from None


def _syntax_error(path: Path, error: yaml.MarkedYAMLError, *, is_private: bool) -> UserError:
    """What the parser says; of a file that may hold secrets without what it quotes, such as an unknown alias."""
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    hint = "indent with spaces, not tabs" if mark and "\\t" in str(error.problem) else None
    problem = str(error.problem or error.context)
    if is_private:
        problem = _QUOTED.sub("…", problem)
    return UserError(f"not valid YAML: {problem}", where=where, hint=hint)


def _record(node: yaml.Node, path: KeyPath, document: Document, active: tuple[int, ...]) -> None:
    """Write down the line of every key path below `node`, and refuse a key written twice."""
    if id(node) in active:
        raise UserError("an anchor contains itself", where=document.where(path, value=False))
    active = (*active, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[(*path, index)] = item.start_mark.line + 1
            _record(item, (*path, index), document, active)
    elif isinstance(node, yaml.MappingNode):
        own: set[str] = set()
        for key, item in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                    _record(merged, path, document, active)
                continue
            child = (*path, str(key.value))
            if str(key.value) in own:
                first = document.lines[child]
                raise UserError(
                    f"the key {key.value!r} is written twice",
                    where=f"{document.path}:{key.start_mark.line + 1}  {'.'.join(map(str, child))}",
                    hint=f"the first is on line {first}; keep one",
                )
            own.add(str(key.value))
            document.lines[child] = key.start_mark.line + 1
            _record(item, child, document, active)


def _plain(value: Any) -> Any:
    """JSON types only: keys become strings (YAML reads `on:` as true), dates their ISO form."""
    if isinstance(value, bytes):
        raise ValueError("`!!binary` is not supported")
    if isinstance(value, str) and not value.isascii():
        value.encode()  # half of a surrogate pair, which no file takes
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.isoformat()
    return value


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list)) and len(show(value)) > 60


def _apply(document: Document, override: str) -> None:
    """Apply one `key.path=value`; the value is YAML."""
    name, equals, text = override.partition("=")
    if any("\ud800" <= letter <= "\udfff" for letter in override):
        raise UserError(
            f"an override is not UTF-8: {shortened(without_secrets(override), 200)}", where="command line"
        )
    where = f"command line `{without_secrets(override)}`"
    parts = name.strip().split(".")
    if len(parts) > MAX_DEPTH:
        raise UserError(
            f"nested deeper than {MAX_DEPTH} levels: {shortened(name, 100)}",
            where="command line",
            hint="write key.path=value, without spaces around =, such as seed=1",
        )
    is_strange = is_private_text(name) and NO_NAME.search(name.strip()) is not None
    if not equals or not all(parts) or is_strange:
        raise UserError(
            f"not an override: {without_secrets(override)!r}",
            where="command line",
            hint="write key.path=value, without spaces around =, such as seed=1",
        )
    # Of a value that is not YAML nobody knows whether it holds a secret.
    without_value = f"command line `{name}=…`"
    try:
        check_size(text, without_value)
        node = yaml.compose(text, Loader)
        if node is not None:
            _record(node, (), Document(Path(without_value), {}), active=())
        value = None if node is None else _constructed(node, without_value)
    except yaml.YAMLError:
        what = f"the value of {shortened(name, 200)} is not valid YAML"
        raise UserError(what, where=without_value, hint="quote it") from None
    target: Any = document.data
    for depth, part in enumerate(parts[:-1]):
        if target.get(part) is None:
            _check_named(target, parts[: depth + 1], where)
            target[part] = {}
        if not isinstance(target[part], dict):
            dotted = ".".join(parts[: depth + 1])
            held = "a value" if is_private(tuple(parts)) else show(target[part])
            raise UserError(
                f"{dotted} holds {held}, which has no keys",
                where=where,
                hint=f"override the whole value: {dotted}=…",
            )
        target = target[part]
    _check_named(target, parts, where)
    target[parts[-1]] = value
    written = tuple(parts)
    document.overrides[written] = override
    # What the file wrote inside is gone, and so are its lines.
    for path in [path for path in document.lines if path[: len(parts)] == written and path != written]:
        del document.lines[path]


def _check_named(parent: Mapping[str, Any], parts: Sequence[str], where: str) -> None:
    """Refuse an override that would invent a stage or a dataset."""
    if len(parts) != 2 or parts[0] not in _NAMED or parts[1] in parent:
        return
    close = nearest(parts[1], parent)
    what = {"stages": "stage", "data": "dataset"}[parts[0]]
    known = ", ".join(parent) or "none"
    raise UserError(
        f"there is no {what} {parts[1]!r}",
        where=where,
        hint=f"did you mean {close!r}?" if close else f"there are: {known}",
    )
