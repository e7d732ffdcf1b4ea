"""A part of a stage that a user's package brings: its settings are typed fields, what it does is one method.

In a pipeline file it is a name, or a mapping with the name as `use` and its settings beside it:

    metrics:
      - effective_rank
      - {use: "my_package.rank:EffectiveRank", threshold: 0.9}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from orchestrator import installed
from orchestrator.config.settings import Settings
from orchestrator.installed import ExtensionError, Group

USE = "The name of an installed package's entry point, or an import path, package.module:Class."


class Extension(Settings):
    """Base of all such parts. A subclass adds fields, each of which is part of the key, and overrides one method.

    Attributes:
        group: where its entry points are: `orchestrator.GROUP`.
        method: what a subclass must override.
        builtin: import paths of our own ones by name; they need no package, and come before those of packages.
        version: of what it computes. Whoever changes that raises it, so that stages that use it run again.
    """

    group: ClassVar[Group]
    method: ClassVar[str]
    builtin: ClassVar[Mapping[str, str]] = {}
    version: ClassVar[int] = 1

    use: str = Field(description=USE)

    @classmethod
    def chosen(cls, value: Any) -> type[Self]:
        """The class that a value of a pipeline file names; this one if it names none.

        Raises:
            ExtensionError: it is not there, or does not fit.
        """
        name = value.get("use") if isinstance(value, Mapping) else value
        return cls.named(name) if isinstance(name, str) else cls

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The class of that name or import path; raises as :meth:`chosen`."""
        found = installed.find(cls.group, cls.builtin.get(name, name), cls.builtin)
        if not (isinstance(found, type) and issubclass(found, cls)):
            raise ExtensionError(
                f"{name} is not a subclass of orchestrator.{cls.__name__}",
                hint=f"derive it: class Name(orchestrator.{cls.__name__})",
            )
        if getattr(found, cls.method) is getattr(cls, cls.method):
            raise ExtensionError(f"{name} lacks the method {cls.method!r}", hint=f"define {cls.method}(…)")
        check_version(name, found.version)
        return found


def check_version(name: str, version: Any) -> None:
    """Raises ExtensionError unless a version is an integer from 1 on."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ExtensionError(
            f"{name} has the version {version!r}", hint="give an integer: version: ClassVar[int] = 1"
        )


@dataclass(frozen=True)
class Chosen:
    """Makes a field that takes any subclass of an extension: `Annotated[SerializeAsAny[Metric], Chosen(Metric)]`."""

    base: type[Extension]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """An instance of the class that the value names."""
        return core_schema.no_info_before_validator_function(self._made, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """A name, or a mapping; of each installed class with its own keys."""
        named = {"type": "string", "pattern": installed.PATH}
        mapping = {"type": "object", "required": ["use"], "properties": {"use": named}}
        choices: list[dict[str, Any]] = [{**named, "description": USE}, mapping]
        for name, found in self._installed():
            keys = handler(found.__pydantic_core_schema__)
            choices.append({"const": name})
            choices.append({"allOf": [keys, {"properties": {"use": {"const": name}}}]})
        return {"anyOf": choices}

    def _made(self, value: Any) -> Any:
        if isinstance(value, self.base):
            return value
        keys = {"use": value} if isinstance(value, str) else value
        return self.base.chosen(value).model_validate(keys)

    def _installed(self) -> Iterator[tuple[str, type[Extension]]]:
        """Those that can be used; a broken package is told where a file names it."""
        for name in (*self.base.builtin, *installed.names(self.base.group)):
            try:
                yield name, self.base.named(name)
            except ExtensionError:
                continue


@dataclass(frozen=True)
class Named:
    """Marks a field as the name of one thing of a group: the JSON Schema lists the names that there are.

    Attributes:
        group: what the field names.
        ours: names that need no package.
        by_path: whether an import path will do, too.
    """

    group: Group
    ours: tuple[str, ...] = ()
    by_path: bool = False

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The text of the field's schema becomes a choice; that it may be null stays."""
        found = handler(schema)
        known: list[dict[str, Any]] = [{"pattern": installed.PATH}] if self.by_path else []
        if names := [*self.ours, *installed.names(self.group)]:
            known.append({"enum": names})
        for choice in found.get("anyOf", [found]):
            if choice.get("type") == "string":
                choice.pop("pattern", None)
                choice.update(known[0] if len(known) == 1 else {"anyOf": known})
        return found


class Address:
    """Marks a field as the address of a store: the JSON Schema knows the schemes that there are."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """A folder is no address, and takes any text."""
        schemes = "|".join(re.escape(name) for name in (*installed.STORES, *installed.names("stores")))
        return {**handler(schema), "pattern": f"^(?:{schemes})://|^(?!.*://)"}


def extensions(config: BaseModel) -> Iterator[Extension]:
    """The extensions in a config that decide what comes out, at any depth."""
    for section in _sections(config):
        if isinstance(section, Extension):
            yield section


def versions(config: BaseModel) -> dict[str, Any]:
    """What users' packages bring to a config, and the versions of it: part of the stage's key, by name.

    Of a model it is the shape as well, which its name alone does not fix.
    """
    found: dict[str, Any] = {f"{part.group} {part.use}": type(part).version for part in extensions(config)}
    brought = installed.names("models")
    for section in _sections(config) if brought else ():
        for name, field in type(section).model_fields.items():
            model = getattr(section, name)
            if _is_model(field) and model in brought:
                shape = installed.find("models", model)
                fields = asdict(shape)
                # It came later, and follows from the data.
                fields.pop("num_channels", None)
                found[f"models {model}"] = {"version": getattr(shape, "version", 1), **fields}
    return found


def _is_model(field: FieldInfo) -> bool:
    return any(isinstance(mark, Named) and mark.group == "models" for mark in field.metadata)


def _sections(config: BaseModel) -> Iterator[BaseModel]:
    """A config and all sections below it, without those that only say how something runs."""
    yield config
    for name, field in type(config).model_fields.items():
        if not _operational(field):
            for section in _models_in(getattr(config, name)):
                yield from _sections(section)


def _models_in(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _models_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _models_in(item)


def _operational(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))
