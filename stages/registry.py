"""The stage kinds of users' packages beside ours: found by entry point or import path, checked, and typed like ours."""

from __future__ import annotations

import functools
import logging
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_args

from pydantic import Field

from orchestrator import installed
from orchestrator.config.extension import check_version
from orchestrator.config.schema import Pipeline
from orchestrator.errors import shortened
from orchestrator.installed import ExtensionError
from orchestrator.stages import AnyStage
from orchestrator.stages.base import Input, Stage

logger = logging.getLogger("orchestrator")

# As a kind is part of the names of artifacts.
_KIND = re.compile(r"[a-z0-9][a-z0-9_\-]{0,49}")


def kinds_of(stages: Any) -> dict[str, type[Stage]]:
    """The classes of a union of stages, such as :data:`orchestrator.stages.AnyStage`, by kind."""
    return {kind_of(stage): stage for stage in get_args(get_args(stages)[0])}


def kind_of(stage: type[Stage]) -> str:
    """The name of a stage's kind; empty if it is not a Literal of one text."""
    kinds = get_args(stage.model_fields["kind"].annotation)
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], str) else ""


def with_classes(stages: Any, more: Iterable[type[Stage]]) -> Any:
    """A union of stages, and classes beside it."""
    classes = dict.fromkeys((*kinds_of(stages).values(), *more))
    annotated: Any = Annotated
    return annotated[functools.reduce(operator.or_, classes), Field(discriminator="kind")]


def stage_class(name: str, stages: Any) -> type[Stage]:
    """The class of a user's package that a pipeline file names as the kind of a stage.

    Args:
        name: of an entry point, or an import path.
        stages: the union of kinds that are there already.

    Raises:
        ExtensionError: it is not there, or does not fit.
    """
    found = installed.find("stages", name, kinds_of(stages))
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise ExtensionError(
            f"{name} is not a subclass of orchestrator.Stage",
            hint="derive it: class Name(orchestrator.Stage)",
        )
    kind = kind_of(found)
    if not _KIND.fullmatch(kind):
        raise ExtensionError(
            f"{name} does not say its kind",
            hint='add the field `kind: Literal["my_kind"]`, of a-z, 0-9, - and _',
        )
    if kinds_of(stages).get(kind, found) is not found:
        raise ExtensionError(
            f"{name} has the kind {kind!r}, which there is already", hint="give it another name"
        )
    if not installed.is_path(name) and kind != name:
        raise ExtensionError(
            f"the entry point {name!r} is a stage of kind {kind!r}", hint=f"call the entry point {kind!r}"
        )
    if found.run is Stage.run:
        raise ExtensionError(f"{name} lacks the method 'run'", hint="define run(self, context)")
    check_version(name, found.version)
    _check_declarations(name, found)
    return found


def _check_declarations(name: str, stage: type[Stage]) -> None:
    """Raises ExtensionError unless what a class declares is of the right types."""
    if not isinstance(stage.inputs, tuple) or not all(isinstance(one, Input) for one in stage.inputs):
        raise ExtensionError(
            f"{name} has the inputs {shortened(repr(stage.inputs), 100)}",
            hint='give a tuple: inputs = (orchestrator.Input("index", ("curate",)),)',
        )
    outputs: object = stage.outputs
    if not isinstance(outputs, Mapping) or not all(
        isinstance(part, str) for pair in outputs.items() for part in pair
    ):
        raise ExtensionError(
            f"{name} has the outputs {shortened(repr(outputs), 100)}",
            hint='give a mapping of files to what they hold: outputs = {"table.json": "the figures"}',
        )
    for switch in ("needs_ray", "effects"):
        if not isinstance(getattr(stage, switch), bool):
            raise ExtensionError(
                f"{name} has {switch} = {shortened(repr(getattr(stage, switch)), 100)}",
                hint="give True or False",
            )


def file_of(stages: Any) -> type[Pipeline[Stage]]:
    """The model of a pipeline file whose stages are of a union of kinds."""
    generic: Any = Pipeline
    found: type[Pipeline[Stage]] = generic[stages]
    return found


@installed.until_registered
def every_stage() -> Any:
    """The union of our stage kinds and those of all installed packages; what cannot be used is left out with a line."""
    union: Any = AnyStage
    for name in installed.names("stages"):
        try:
            union = with_classes(union, [stage_class(name, union)])
        except ExtensionError as error:
            logger.warning("a stage kind is left out: %s", error.what)
    return union
