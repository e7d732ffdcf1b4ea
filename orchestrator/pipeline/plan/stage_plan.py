"""What would run, what is cached, and why. Planning reads the store and writes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from orchestrator.config.extension import extensions
from orchestrator.config.schema import DataSource
from orchestrator.errors import UserError, nearest
from orchestrator.fsio import sha256_of
from orchestrator.pipeline import dag
from orchestrator.pipeline.keys import code_digest, more_steps
from orchestrator.pipeline.keys.cache_key import KeyParts, diff, key_parts, short
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan import crop_checks
from orchestrator.pipeline.store.ledger import PipelineState, StageState
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.base import Stage
from orchestrator.storage.artifacts import Artifact

# A dataset and its name → the hash of its content.
Fingerprint = Callable[[DataSource, str], str]
Hashes = Callable[[str, Stage], dict[str, str]]
# A kind and a key → how far the unfinished work on it is, such as `step 40`; nothing if that is not known.
Reached = Callable[[str, str], str]
# A kind and a key → the content that the unfinished work on it reads, by role; None if that is not known.
BegunFrom = Callable[[str, str], Mapping[str, str] | None]
# Files of other code that are named before the rest is counted.
_NAMED = 3
_STARTS_OVER = ", starts over: it has no checkpoint"


@dataclass(frozen=True)
class ResolvedStage:
    """A stage whose key is known: keys depend on configs, data and code, never on what already ran.

    Attributes:
        tied_to_steps: see :meth:`Stage.tied_to_steps`.
    """

    name: str
    parts: KeyParts
    key: str
    roles: Mapping[str, str]
    needs: tuple[str, ...]
    code: Mapping[str, str]
    effects: bool = False
    tied_to_steps: more_steps.TiedToSteps | None = None


@dataclass(frozen=True)
class Choice:
    """Which stages a command is about, and what of theirs is made anew though it is there.

    Attributes:
        only: these; empty for all.
        first: this one and all that depend on it.
        last: this one and all that it depends on.
        force: these, whatever is there of them, and what depends on them.
        on_code: what other code made, and what depends on that.
    """

    only: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None
    force: tuple[str, ...] = ()
    on_code: bool = False

    def of(self, stages: Sequence[ResolvedStage]) -> set[str]:
        """The names of the chosen stages.

        Raises:
            UserError: there is no such stage, none is left, or a stage is to be made anew that is not chosen.
        """
        needs = {stage.name: stage.needs for stage in stages}
        self._check(tuple(needs))
        chosen = set(self.only or needs)
        if self.first is not None:
            chosen &= {
                name for name in needs if name == self.first or self.first in dag.upstream(name, needs)
            }
        if self.last is not None:
            chosen &= {self.last, *dag.upstream(self.last, needs)}
        if not chosen:
            raise UserError(
                "these options together select no stage",
                where="--only, --from and --until",
                hint="a stage runs only if every one of these options selects it",
            )
        for name in self.force:
            if name not in chosen:
                raise UserError(
                    f"stage {name!r} is forced but not selected",
                    where=f"--force {name}",
                    hint="select it with --only, --from or --until too",
                )
        return chosen

    def _check(self, names: Sequence[str]) -> None:
        given = [("--only", name) for name in self.only] + [("--force", name) for name in self.force]
        given += [("--from", self.first)] if self.first is not None else []
        given += [("--until", self.last)] if self.last is not None else []
        for option, name in given:
            if name not in names:
                close = nearest(name, names)
                hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(names)}"
                raise UserError(f"there is no stage {name!r}", where=f"{option} {name}", hint=hint)


EVERYTHING = Choice()


@dataclass(frozen=True)
class StagePlan:
    """What happens to one stage, and why.

    Attributes:
        anew: what it makes replaces what is there already: the artifact of its key, and pieces of it.
        fresh: it starts over; unfinished work of its key is dropped.
        other_code: files and packages that are not what they were when the artifact was made.
        forced: the user named it with `--force`.
        shorter: the artifact of the same stage with fewer steps, from which it goes on.
    """

    stage: ResolvedStage
    action: Literal["run", "cached", "left out"]
    reasons: tuple[str, ...]
    artifact: Artifact | None = None
    anew: bool = False
    fresh: bool = False
    other_code: tuple[str, ...] = ()
    forced: bool = False
    shorter: Artifact | None = None

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    @property
    def kind(self) -> str:
        """The stage's kind."""
        return self.stage.parts.kind


def resolve(
    loaded: LoadedPipeline, fingerprint: Fingerprint | None = None, hashes: Hashes | None = None
) -> list[ResolvedStage]:
    """Every stage with its key, in running order.

    Args:
        loaded: the pipeline.
        fingerprint: the content hash of a dataset; default: the package's.
        hashes: of the files that a stage's fields name, by field; default: they are read.

    Raises:
        UserError: the graph does not work out, or a dataset cannot be read.
    """
    names = dag.order(loaded)
    roles = dag.roles(loaded)
    crop_checks.check(loaded, roles)
    prints = _fingerprints(loaded, fingerprint or _fingerprint)
    keys: dict[str, str] = {}
    resolved = []
    for name in names:
        stage = loaded.spec.stages[name]
        parts = key_parts(
            stage,
            inputs={role: keys[need] for role, need in roles[name].items()},
            data={source: prints[source] for source in stage.data_sources()}
            | (hashes(name, stage) if hashes else contents(stage)),
            seed=loaded.spec.seed,
        )
        keys[name] = parts.key
        found = code_digest.code_of(type(stage).__module__)
        for extension in extensions(stage):
            found = found | code_digest.code_of(type(extension).__module__)
        resolved.append(
            ResolvedStage(
                name,
                parts,
                parts.key,
                roles[name],
                stage.needs,
                found,
                stage.effects,
                stage.tied_to_steps(),
            )
        )
    return resolved


def plan_of(
    loaded: LoadedPipeline, stages: list[ResolvedStage], choice: Choice = EVERYTHING
) -> list[StagePlan]:
    """:func:`plan` for what is in the pipeline's store now."""
    workspace = Workspace(loaded.spec.store)
    driver = workspace.driver(loaded.name)
    return plan(
        stages,
        workspace.state(loaded.name),
        workspace.find,
        driven=driver is not None and driver.alive,
        reached=workspace.reached,
        begun_from=workspace.begun_from,
        choice=choice,
    )


def plan(
    stages: list[ResolvedStage],
    state: PipelineState,
    find: Callable[[str, str], Artifact | None],
    *,
    driven: bool = False,
    reached: Reached = lambda kind, key: "",
    begun_from: BegunFrom = lambda kind, key: None,
    choice: Choice = EVERYTHING,
) -> list[StagePlan]:
    """For every resolved stage: run it or not, and the reasons in words.

    Args:
        stages: in running order.
        state: the pipeline's ledger.
        find: the artifact of a kind and a key, or None.
        driven: another process is running the pipeline now.
        reached: how far unfinished work is.
        begun_from: what unfinished work reads.
        choice: which stages to look at, and which to make anew.

    Raises:
        UserError: the choice leaves nothing, or leaves out what a chosen stage reads and what is not there.
    """
    chosen = choice.of(stages)
    plans: dict[str, StagePlan] = {}
    for stage in stages:
        known = state.stages.get(stage.name)
        artifact = find(stage.parts.kind, stage.key)
        if stage.name not in chosen:
            plans[stage.name] = StagePlan(stage, "left out", ("not chosen",), artifact)
        else:
            begun = begun_from(stage.parts.kind, stage.key)
            planned = _planned(stage, known, artifact, plans, driven, reached, begun, choice)
            plans[stage.name] = _lengthened(planned, known, find, plans, reached)
    _check_inputs(plans)
    return list(plans.values())


def _planned(
    stage: ResolvedStage,
    known: StageState | None,
    artifact: Artifact | None,
    before: Mapping[str, StagePlan],
    driven: bool,
    reached: Reached,
    begun: Mapping[str, str] | None,
    choice: Choice,
) -> StagePlan:
    going = known is not None and known.key == stage.key and known.state not in ("done", "pending")
    other = tuple(_other_code(artifact, stage)) if artifact is not None else ()
    begun_by_other = known is not None and going and known.code not in ("", code_digest.digest_of(stage.code))
    anew = [role for role, need in stage.roles.items() if before[need].anew]
    if stage.name in choice.force:
        return StagePlan(stage, "run", ("made again: --force",), artifact, anew=True, fresh=True, forced=True)
    if anew:
        # Pieces may be there where the artifact is not, also from another key of the stage.
        inputs = [f"{_input(role, stage.roles)} is made again" for role in anew]
        reasons = inputs if artifact is not None or going else _why_run(known, stage, driven, reached)
        return StagePlan(stage, "run", tuple(reasons), artifact, anew=True, fresh=True)
    if choice.on_code and other:
        return StagePlan(stage, "run", (_by_other(other),), artifact, anew=True, fresh=True)
    if artifact is not None and not (going and is_awaited(known, artifact)):
        notes = [_by_other(other)] if other else []
        made_from = artifact.manifest.provenance.get("inputs", {})
        notes += [f"made from an earlier {name}" for name in other_inputs(made_from, stage, _made(before))]
        why = _why_cached(known, stage) + (f" ({'; '.join(notes)})" if notes else "")
        return StagePlan(stage, "cached", (why,), artifact, other_code=other)
    earlier = other_inputs(begun or {}, stage, _made(before))
    # What was begun with another input is not gone on with.
    reasons = [] if earlier and going else _why_run(known, stage, driven, reached)
    reasons += [begun_with(earlier)] if earlier else []
    fresh = bool(earlier) or (begun_by_other and choice.on_code)
    if begun_by_other and not earlier:
        reasons.append("begun by other code" + (", so it starts over: --rerun-on code" if fresh else ""))
    # What was to replace something when it began still is.
    replaces = fresh or (known is not None and going and known.anew)
    return StagePlan(stage, "run", tuple(reasons), artifact, anew=replaces, fresh=fresh)


def _lengthened(
    planned: StagePlan,
    known: StageState | None,
    find: Callable[[str, str], Artifact | None],
    before: Mapping[str, StagePlan],
    reached: Reached,
) -> StagePlan:
    """The plan of a stage that was done with fewer steps: it goes on from there, or says why it does not."""
    stage = planned.stage
    made = known.made if known is not None else None
    if planned.action != "run" or planned.fresh or planned.anew or stage.tied_to_steps is None:
        return planned
    longer = more_steps.grown(made, stage.parts, stage.tied_to_steps) if made is not None else {}
    if made is None or not longer or reached(stage.parts.kind, stage.key):
        return planned
    shorter = find(made.kind, made.key)
    if shorter is None:
        return planned
    reasons = tuple(reason.removesuffix(_STARTS_OVER) for reason in planned.reasons)
    made_from = shorter.manifest.provenance.get("inputs", {})
    if earlier := other_inputs(made_from, stage, _made(before)):
        why = f"starts over: the shorter run was {begun_with(earlier).partition(',')[0]}"
        return replace(planned, reasons=(*reasons, why))
    why, goes_on = more_steps.told(longer, stage.tied_to_steps)
    return replace(planned, reasons=(*reasons, why), shorter=shorter if goes_on else None)


def is_awaited(known: StageState | None, artifact: Artifact) -> bool:
    """Whether an attempt that was to replace the artifact has not done so yet."""
    return known is not None and known.anew and artifact.manifest.provenance.get("run_id") != known.run_id


def _check_inputs(plans: Mapping[str, StagePlan]) -> None:
    for item in plans.values():
        needs = dict.fromkeys(item.stage.roles.values() if item.action == "run" else ())
        lacking = [
            need for need in needs if plans[need].action == "left out" and plans[need].artifact is None
        ]
        if lacking:
            names = ", ".join(map(repr, lacking))
            several = len(lacking) > 1
            raise UserError(
                f"stage {item.name!r} needs the artifact{'s' if several else ''} of {names}, which "
                f"{'do' if several else 'does'} not exist and {'are' if several else 'is'} not selected",
                where="--only, --from and --until",
                hint=f"run {'them' if several else 'it'} too: --until {item.name}",
            )


def _other_code(artifact: Artifact, stage: ResolvedStage) -> list[str]:
    """Files and packages that are not what they were when the artifact was made, as far as it says."""
    provenance = artifact.manifest.provenance
    record = provenance.get("code", {})
    files = record.get("files", {}) if isinstance(record, dict) else {}
    packages = provenance.get("versions", {})
    found = code_digest.changes(files, stage.code) if files else []
    return found + [f"{name} {old}" for name, old in packages.items() if _packages().get(name) != old]


def other_inputs(
    digests: Mapping[str, str], stage: ResolvedStage, artifacts: Mapping[str, Artifact]
) -> list[str]:
    """The needed stages whose artifacts have other content than what was read of them, as far as that is known.

    Args:
        digests: of the content that was read, by role.
        stage: who read it.
        artifacts: what there is now, by stage.
    """
    return [
        need
        for role, need in stage.roles.items()
        if need in artifacts and role in digests and artifacts[need].manifest.digest != digests[role]
    ]


def begun_with(earlier: Sequence[str]) -> str:
    """Why a stage whose unfinished work read what has been made anew since starts over."""
    return f"begun with an earlier {' and '.join(earlier)}, so it starts over"


def _made(plans: Mapping[str, StagePlan]) -> dict[str, Artifact]:
    return {name: item.artifact for name, item in plans.items() if item.artifact is not None}


@cache
def _packages() -> dict[str, str]:
    return code_digest.versions(code_digest.PACKAGES)


def _by_other(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return f"made by other code: {', '.join(names[:_NAMED])}" + (f" and {more} more" if more > 0 else "")


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
            digest.update(bytes.fromhex(sha256_of(path)))
        contents[field] = digest.hexdigest()
    return contents


def _why_cached(known: StageState | None, stage: ResolvedStage) -> str:
    if stage.effects:
        return "a run compares it with the registry"
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


def _goes_on(stage: ResolvedStage, reached: Reached, otherwise: str = _STARTS_OVER) -> str:
    where = reached(stage.parts.kind, stage.key)
    return f", goes on from {where}" if where else otherwise


def _named(line: str, roles: Mapping[str, str]) -> str:
    """Add the needed stage's name to an input's line where it differs from the role's."""
    if not line.startswith("input "):
        return line
    role, colon, rest = line.removeprefix("input ").partition(":")
    return f"{_input(role, roles)}{colon}{rest}"


def _input(role: str, roles: Mapping[str, str]) -> str:
    need = roles.get(role, role)
    return f"input {role}{f' ({need})' if need != role else ''}"


def _fingerprints(loaded: LoadedPipeline, fingerprint: Fingerprint) -> dict[str, str]:
    """The content hash of every dataset that a stage reads."""
    used = {name for stage in loaded.spec.stages.values() for name in stage.data_sources()}
    prints = {}
    for name in sorted(used):
        try:
            prints[name] = fingerprint(loaded.spec.data[name], name)
        except UserError as error:
            raise UserError(error.what, where=in_dataset(loaded, name, error), hint=error.hint) from None
    return prints


def in_dataset(loaded: LoadedPipeline, name: str, error: UserError) -> str:
    """Where a mistake in a dataset is: a line of its manifest, or the key of the pipeline file."""
    said, manifest = error.where or "", loaded.spec.data[name].manifest
    if manifest is not None and manifest.name in said:
        return said
    key = said.removeprefix(f"data.{name}.")
    return loaded.where("data", name, key if key in ("captions", "manifest") else "path")


def as_recorded(loaded: LoadedPipeline, state: PipelineState) -> list[ResolvedStage]:
    """Every stage with the key that it has if its data is what the ledger last said it was; no data is read.

    Empty if the stages do not work out.
    """
    parts = {name: stage.parts for name, stage in state.stages.items() if stage.parts is not None}
    # The newest of a name; one that no stage has read yet has no artifact either.
    datasets = {name: print_ for one in parts.values() for name, print_ in one.data.items()}

    def hashes(name: str, stage: Stage) -> dict[str, str]:
        known = parts[name].data if name in parts else {}
        return {field: known.get(field, "") for field in stage.files()}

    try:
        return resolve(loaded, lambda source, name: datasets.get(name, ""), hashes)
    except UserError:
        return []


def _fingerprint(source: DataSource, name: str) -> str:
    from orchestrator.data.sources.folder import fingerprint

    return fingerprint(source, name)
