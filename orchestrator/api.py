"""Pipelines from Python (docs/python.md). What is heavy is imported when a function is called."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.errors import Stopped, UserError, joined, shortened

if TYPE_CHECKING:
    from orchestrator.pipeline.load import LoadedPipeline
    from orchestrator.pipeline.plan.stage_plan import Choice
    from orchestrator.pipeline.store.workspace import Workspace
    from orchestrator.storage.artifacts import Artifact

_STOPPED = 130


class RunError(RuntimeError):
    """A run that did not finish: a stage failed. What is done is kept, and the same call goes on.

    Attributes:
        exit_code: that of the command line: 1 a stage failed, 2 a mistake in the file.
    """

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Planned:
    """What would happen to one stage.

    Attributes:
        name: in the pipeline file.
        kind: what it does.
        action: whether it would run, is done already, or was left out by the arguments.
        reasons: why, a line each.
        key: its content key: same key, same artifact.
    """

    name: str
    kind: str
    action: Literal["run", "cached", "left out"]
    reasons: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Result:
    """What one stage made.

    Attributes:
        name: in the pipeline file.
        kind: what it does.
        key: its content key.
        summary: the figures of its summary line.
    """

    name: str
    kind: str
    key: str
    summary: Mapping[str, float]
    _artifact: Artifact = field(repr=False)
    _workspace: Workspace = field(repr=False)

    def folder(self) -> Path:
        """The artifact's folder on this machine, to be read only; fetched first if the store is elsewhere.

        Raises:
            UserError: its files are not as they were written.
        """
        return self._workspace.artifacts().fetch(self._artifact)


def run(
    file: str | os.PathLike[str],
    *overrides: str,
    only: Sequence[str] = (),
    first: str | None = None,
    last: str | None = None,
    force: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Result]:
    """Run what has to run of a pipeline and skip what is done, as `orchestrator run` does.

    Args:
        file: the pipeline file. Relative paths in it are relative to the current directory.
        overrides: `key.path=value`, as on the command line.
        only: these stages alone.
        first: this stage and all that depend on it.
        last: this stage and all that it depends on.
        force: stages to make anew though they are there.
        quiet: whether nothing is printed.

    Returns:
        What each stage made, by name, in running order; without stages that were left out and were never made.

    Raises:
        UserError: a mistake in the file, or something that it needs is not there.
        RunError: a stage failed.
        Stopped: Ctrl-C; what is done is kept.
    """
    from rich.console import Console

    from orchestrator.pipeline.check.pipeline_check import check
    from orchestrator.pipeline.console import Reporter, print_findings
    from orchestrator.pipeline.run.driver import execute
    from orchestrator.pipeline.store.workspace import Workspace

    console = Console(quiet=quiet)
    choice = _choice(only, first, last, force)
    loaded = _loaded(file, overrides, needs_data=False)
    found = check(loaded, runs=True, choice=choice)
    print_findings(console, found, incomplete_only=True)
    found.raise_if_any()
    code = execute(loaded, found.stages, Reporter(console, "the same call"), choice=choice)
    if code == _STOPPED:
        raise Stopped(f"{file} was stopped; the same call goes on")
    if code:
        raise RunError(f"{file} did not finish: read `orchestrator status {file}`", code)
    workspace = Workspace(loaded.spec.store)
    results = {}
    for stage in found.stages:
        artifact = workspace.find(stage.parts.kind, stage.key)
        if artifact is not None:
            summary = artifact.manifest.summary
            results[stage.name] = Result(
                stage.name, stage.parts.kind, stage.key, summary, artifact, workspace
            )
    return results


def plan(
    file: str | os.PathLike[str],
    *overrides: str,
    only: Sequence[str] = (),
    first: str | None = None,
    last: str | None = None,
    force: Sequence[str] = (),
) -> dict[str, Planned]:
    """What :func:`run` with the same arguments would do, by stage in running order. Changes nothing.

    Raises:
        UserError: a mistake in the file, or data that is not there, on which keys depend.
    """
    from orchestrator.pipeline.check.pipeline_check import check
    from orchestrator.pipeline.plan.stage_plan import plan_of

    choice = _choice(only, first, last, force)
    loaded = _loaded(file, overrides, needs_data=True)
    found = check(loaded, runs=False, choice=choice)
    found.raise_if_any()
    if loaded.missing:
        raise joined(loaded.missing)
    return {
        item.name: Planned(item.name, item.kind, item.action, item.reasons, item.stage.key)
        for item in plan_of(loaded, found.stages, choice)
    }


def _path(given: object) -> Path:
    """Raises UserError unless `given` is a path."""
    if not isinstance(given, (str, os.PathLike)):
        raise UserError(f"this is not a path: {shortened(repr(given), 80)}")
    return Path(given)


def _loaded(file: str | os.PathLike[str], overrides: Sequence[str], *, needs_data: bool) -> LoadedPipeline:
    from orchestrator.pipeline.load import load as read

    if not all(isinstance(override, str) for override in overrides):
        raise UserError("an override is a text", hint='give "key.path=value", such as "seed=1"')
    return read(_path(file), overrides, needs_data=needs_data, gather=True)


def _choice(only: Sequence[str], first: str | None, last: str | None, force: Sequence[str]) -> Choice:
    from orchestrator.pipeline.plan.stage_plan import Choice

    for what, name in (("first", first), ("last", last)):
        if name is not None:
            _names(what, [name])
    return Choice(_names("only", only), first, last, _names("force", force))


def _names(what: str, given: object) -> tuple[str, ...]:
    """Names of stages: one text, or a list or tuple of them."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"`{what}` is not the name of a stage: {shortened(repr(given), 100)}")
    return tuple(names)
