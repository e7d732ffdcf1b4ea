"""What would run, what is cached, and why. Planning reads the store and writes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import UserError
from orchestrator.pipeline import fit, graph
from orchestrator.pipeline.key import KeyParts, diff, key_parts, short
from orchestrator.pipeline.ledger import PipelineState, StageState
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.spec import DataSource
from orchestrator.stages.base import Stage
from orchestrator.store.artifact import Artifact

# A data source and its name → the hash of its content.
Fingerprint = Callable[[DataSource, str], str]
# A kind and a key → how far the unfinished work on it is, such as `step 40`; nothing if that is not known.
Reached = Callable[[str, str], str]


@dataclass(frozen=True)
class ResolvedStage:
    """A stage whose key is known: keys depend on configs, data and code, never on what already ran."""

    name: str
    parts: KeyParts
    key: str
    roles: Mapping[str, str]
    needs: tuple[str, ...]
    effects: bool = False


@dataclass(frozen=True)
class StagePlan:
    """What happens to one stage, and why."""

    stage: ResolvedStage
    action: Literal["run", "cached"]
    reasons: tuple[str, ...]
    artifact: Artifact | None = None

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    @property
    def kind(self) -> str:
        """The stage's kind."""
        return self.stage.parts.kind


def resolve(loaded: LoadedPipeline, fingerprint: Fingerprint | None = None) -> list[ResolvedStage]:
    """Every stage with its key, in running order.

    Args:
        loaded: the pipeline.
        fingerprint: the content hash of a data source; default: the package's.

    Raises:
        UserError: the graph does not work out, or a data source cannot be read.
    """
    names = graph.order(loaded)
    roles = graph.roles(loaded)
    fit.check(loaded, roles)
    prints = _fingerprints(loaded, fingerprint or _fingerprint)
    keys: dict[str, str] = {}
    resolved = []
    for name in names:
        stage = loaded.spec.stages[name]
        parts = key_parts(
            stage,
            inputs={role: keys[need] for role, need in roles[name].items()},
            data={source: prints[source] for source in stage.data_sources()} | contents(stage),
            seed=loaded.spec.seed,
        )
        keys[name] = parts.key
        resolved.append(ResolvedStage(name, parts, parts.key, roles[name], stage.needs, stage.effects))
    return resolved


def plan(
    stages: list[ResolvedStage],
    state: PipelineState,
    find: Callable[[str, str], Artifact | None],
    *,
    driven: bool = False,
    reached: Reached = lambda kind, key: "",
) -> list[StagePlan]:
    """For every resolved stage: run it or not, and the reasons in words.

    Args:
        stages: in running order.
        state: the pipeline's ledger.
        find: the artifact of a kind and a key, or None.
        driven: another process is running the pipeline now.
        reached: how far unfinished work is.
    """
    plans: list[StagePlan] = []
    for stage in stages:
        known = state.stages.get(stage.name)
        artifact = find(stage.parts.kind, stage.key)
        if artifact is not None:
            plans.append(StagePlan(stage, "cached", (_why_cached(known, stage),), artifact))
        else:
            plans.append(StagePlan(stage, "run", tuple(_why_run(known, stage, driven, reached))))
    return plans


def needs_attention(plans: list[StagePlan], state: PipelineState) -> bool:
    """Whether `run` has anything to do: a stage to run, or something a dead driver left open."""
    if any(item.action == "run" for item in plans) or state.open:
        return True
    return any(stage.state == "running" for stage in state.stages.values())


def contents(stage: Stage) -> dict[str, str]:
    """The hash of the files that a stage's fields name, by field."""
    contents = {}
    for field, paths in stage.files().items():
        digest = hashlib.sha256()
        for path in paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        contents[field] = digest.hexdigest()
    return contents


def _why_cached(known: StageState | None, stage: ResolvedStage) -> str:
    if stage.effects:
        return "a run compares what it wants with what is there"
    if known is None or known.key != stage.key:
        return f"key {short(stage.key)} was made earlier"
    return f"nothing changed, key {short(stage.key)}"


def _why_run(known: StageState | None, stage: ResolvedStage, driven: bool, reached: Reached) -> list[str]:
    if known is None or known.parts is None:
        return ["never ran"]
    if known.key != stage.key:
        return [_named(line, stage.roles) for line in diff(known.parts, stage.parts)] or ["its key changed"]
    if known.state == "done":
        return ["its artifact is gone or damaged"]
    attempt = f"attempt {known.attempts}"
    if known.state == "running":
        if driven:
            return [f"{attempt} is running"]
        return [f"{attempt} was interrupted{_goes_on(stage, reached)}"]
    if known.state == "failed":
        why = f": {known.error}" if known.error else ""
        return [f"{attempt} failed{why}{_goes_on(stage, reached, otherwise='')}"]
    return [f"{attempt} was stopped{_goes_on(stage, reached)}"]


def _goes_on(
    stage: ResolvedStage, reached: Reached, otherwise: str = ", starts over: it has no checkpoint"
) -> str:
    where = reached(stage.parts.kind, stage.key)
    return f", goes on from {where}" if where else otherwise


def _named(line: str, roles: Mapping[str, str]) -> str:
    """Add the needed stage's name to an input's line where it differs from the role's."""
    if not line.startswith("input "):
        return line
    role, colon, rest = line.removeprefix("input ").partition(":")
    need = roles.get(role, role)
    return f"input {role}{f' ({need})' if need != role else ''}{colon}{rest}"


def _fingerprints(loaded: LoadedPipeline, fingerprint: Fingerprint) -> dict[str, str]:
    """The content hash of every data source that a stage reads."""
    used = {name for stage in loaded.spec.stages.values() for name in stage.data_sources()}
    prints = {}
    for name in sorted(used):
        try:
            prints[name] = fingerprint(loaded.spec.data[name], name)
        except UserError as error:
            is_captions = (error.where or "").startswith(f"data.{name}.captions")
            where = loaded.where("data", name, "captions" if is_captions else "path")
            raise UserError(error.what, where=where, hint=error.hint) from None
    return prints


def _fingerprint(source: DataSource, name: str) -> str:
    from orchestrator.data.source import fingerprint

    return fingerprint(source, name)
