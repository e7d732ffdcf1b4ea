"""`publish`: finished models into the model registry, with what they came from, a card to read, and a gate."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.config.schema import Names
from orchestrator.config.settings import in_key_if_set
from orchestrator.errors import Stopped, UserError, nearest
from orchestrator.fsio import DIGESTS
from orchestrator.names import inside
from orchestrator.stages.base import Context, Input, PlanContext, Stage
from orchestrator.stages.common.config import UNREAD
from orchestrator.stages.common.mlmodel import mlmodel
from orchestrator.stages.common.scores import has_baseline
from orchestrator.stages.publish.card import PICTURE, card
from orchestrator.stages.publish.conditions import (
    CHAMPION,
    METRICS_TAG,
    Condition,
    Conditions,
    judge,
    parse,
)
from orchestrator.stages.publish.models import (
    EVALUATION,
    STUDENTS,
    KnownModel,
    Trained,
    chosen,
    lineage,
    look_up,
    mistakes,
    trained,
)
from orchestrator.storage.artifacts import Artifact
from orchestrator.tracking.aliases import CHALLENGER, AliasedVersion, Decision, Gate, Judged

logger = logging.getLogger("orchestrator")

# What MLflow keeps for itself: `latest` however written, and versions.
RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)
# What is said of a decision stays on a terminal.
_KEPT = {"kept": True}


@dataclass(frozen=True)
class DesiredVersion:
    """A version that the registry should have.

    Attributes:
        known: the model.
        name: of the registered model.
        texts: files that are laid beside the model's, by name.
        digests: sha256 of all files by name; of the model's from when it was trained.
        tags: lineage.
    """

    known: KnownModel
    name: str
    texts: Mapping[str, str]
    digests: Mapping[str, str]
    tags: Mapping[str, str]


class Publish(Stage):
    """Registers trained models in the model registry as `<pipeline>-<stage or student>`. A second run changes nothing.

    Any stage in `needs` that makes a model will do: backbones, students, models for images and texts, and those of
    users' own kinds.
    """

    kind: Literal["publish"]
    alias: str = Field(
        "champion",
        pattern=r"^[A-Za-z][\w\-]*$",
        description="The alias in the model registry that is set to the new version.",
    )
    names: Names = Field(
        (),
        description="The models to publish, as one name or a list: students by their names, other models by their "
        "stages' names. Default: all models.",
    )
    conditions: Conditions = in_key_if_set(
        (),
        description="What a version must reach before it gets the alias, as one condition or a list: `METRIC >= "
        "NUMBER`, `METRIC >= champion` or `beats: raw_pixels`. If one does not hold, the version gets the alias "
        "`challenger` instead (docs/publishing.md).",
    )

    needs_ray: ClassVar[bool] = False
    effects: ClassVar[bool] = True
    inputs: ClassVar[tuple[Input, ...]] = (
        Input(STUDENTS, ("distill",), required=False),
        Input(EVALUATION, ("evaluate",), required=False),
        Input("models", models=True, uncompared=UNREAD),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "models.json": "what is published: kind of model and sha256 of the weights of each model"
    }

    @field_validator("alias")
    @classmethod
    def _free(cls, alias: str) -> str:
        if RESERVED.fullmatch(alias):
            raise ValueError(f"MLflow reserves {alias!r}; use another alias, such as champion")
        return alias

    @model_validator(mode="after")
    def _has_two_aliases(self) -> Publish:
        if self.conditions and self.alias == CHALLENGER:
            raise ValueError(
                f"alias is {CHALLENGER!r}, which versions get for which a condition does not hold: use another alias"
            )
        return self

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: names of no model, and conditions that no evaluation can decide."""
        models = trained(plan_context.upstream, _of_models(plan_context.names))
        if found := list(mistakes(models, self.names)):
            return found
        evaluation = plan_context.upstream.get(EVALUATION)
        if evaluation is None:
            return [_no_evaluation(self.conditions[0])] if self.conditions else []
        where = plan_context.names.get(EVALUATION, EVALUATION)
        picked = chosen(models, self.names)
        unscored = (
            [model for model in picked if model.stage not in evaluation.needs] if self.conditions else []
        )
        if unscored:
            return [_unscored(model, where) for model in unscored]
        wrong = [_undecidable(parse(text), evaluation, picked) for text in self.conditions]
        return [error for error in wrong if error is not None]

    def run(self, context: Context) -> Mapping[str, float]:
        """Publishes; goes on after a crash where it was.

        Raises:
            UserError: a name that no model has, or a registry that cannot be reached or refuses.
            Stopped: the user asked for it; what is published stays.
        """
        from orchestrator.tracking import registry

        published, models, decisions = [], {}, []
        for model in self._chosen(context):
            if context.stop.is_set():
                raise Stopped
            desired = self._desired(context, model)
            folder = _fresh_copy(desired, context)
            facts = registry.Facts(
                kind=desired.tags["orchestrator.model"],
                params={name.removeprefix("orchestrator."): value for name, value in desired.tags.items()},
                metrics=desired.known.metrics,
            )
            told: list[Decision] = []
            number = registry.publish(
                context.run,
                desired.name,
                folder,
                desired.tags,
                self.alias,
                facts=facts,
                digests=desired.digests,
                stop=context.stop,
                gate=self._gate(context, desired, told),
            )
            for decision in told:
                self._log_decision(desired.name, decision)
            decisions += told
            entry = {"name": desired.name, "version": number, "alias": self.alias, "tags": desired.tags}
            published.append(entry | _outcome(told))
            models[model.name] = {
                "model": desired.tags["orchestrator.model"],
                "sha256": _weights_digest(desired.digests),
            }
        # Where they went is the run's to say: the artifact holds for any registry and any name of the pipeline.
        (context.out / "models.json").write_text(json.dumps(models, indent=1) + "\n")
        record = context.work / "published.json"
        record.write_text(json.dumps(published, indent=1) + "\n")
        context.run.file(record, "registry")
        return {"published": float(len(published)), **(self._counts(decisions) if self.conditions else {})}

    def drift(self, context: Context, tracking_uri: str) -> list[str]:
        """See :meth:`Stage.drift`: what the registry lacks, a line a model."""
        from orchestrator.tracking import model_files, registry
        from orchestrator.tracking.patience import interruptibly

        desired = [self._desired(context, model) for model in self._chosen(context)]
        told: list[tuple[str, Decision]] = []

        def compare() -> list[str]:
            found = []
            for one in desired:
                decisions: list[Decision] = []
                gate = self._gate(context, one, decisions)
                content = model_files.content_digest(one.digests)
                found.append(registry.difference(tracking_uri, one.name, content, one.tags, self.alias, gate))
                told.extend((one.name, decision) for decision in decisions)
            return [line for line in found if line is not None]

        lines = interruptibly(compare, tracking_uri, context.stop, "comparing with the registry")
        for name, decision in told if not lines else ():
            if decision.standing == "rolled back":
                self._log_decision(name, decision)
        return lines

    def published(self, artifact: Path, pipeline: str) -> list[str]:
        """See :class:`Stage`. A bare name where a gate may have kept the alias from the version."""
        names = json.loads((artifact / "models.json").read_text(encoding="utf-8"))
        at = "" if self.conditions else f"@{self.alias}"
        return [f"{pipeline}-{name}{at}" for name in names]

    def _gate(self, context: Context, desired: DesiredVersion, told: list[Decision]) -> Gate:
        scores = desired.known.scores
        metrics = dict(sorted(scores.metrics.items())) if scores is not None else {}

        def judged(version: int, holder: AliasedVersion | None) -> Sequence[Judged]:
            return [judge(parse(text), scores, version, holder) for text in self.conditions]

        marks = {METRICS_TAG: json.dumps(metrics)} if metrics else {}
        return Gate(judged, marks, context.forced, told.append)

    def _log_decision(self, name: str, decision: Decision) -> None:
        """Say what became of the alias, and why; what is as usual only if there is a gate."""
        version, holder = f"{name} version {decision.version}", f"version {decision.holder}"
        if decision.standing == "rolled back":
            stays = f"{holder} keeps" if decision.holder is not None else "no version has"
            logger.warning(
                "%s was rolled back, and %s the alias %s; to give it back: orchestrator publish FILE --force",
                version,
                stays,
                self.alias,
            )
            return
        if not decision.judged:
            return
        failed = [one for one in decision.judged if not one.passed]
        what = f"{len(decision.judged) - len(failed)} of {len(decision.judged)} conditions passed"
        if decision.standing == CHALLENGER:
            logger.warning("%s is %s: %s", version, CHALLENGER, what)
        elif failed:
            verb = "keeps" if decision.standing == "holds" else "is forced to be"
            logger.warning("%s %s %s: %s", version, verb, self.alias, what)
        else:
            logger.info("%s is %s: %s", version, self.alias, what, extra=_KEPT)
        for one in decision.judged:
            if one.passed:
                logger.info("  %s", one, extra=_KEPT)
            else:
                logger.warning("  %s", one)

    def _counts(self, decisions: Sequence[Decision]) -> dict[str, float]:
        """Figures of the summary line, where there is a gate."""
        judged = [one for decision in decisions for one in decision.judged]
        return {
            "with_alias": float(sum(one.standing in ("moves", "holds") for one in decisions)),
            "challengers": float(sum(one.standing == CHALLENGER for one in decisions)),
            "conditions_passed": float(sum(one.passed for one in judged)),
            "conditions_failed": float(sum(not one.passed for one in judged)),
        }

    def _desired(self, context: Context, model: Trained) -> DesiredVersion:
        found = look_up(context, model)
        name = f"{context.pipeline}-{model.name}"
        tags = lineage(context, found)
        texts = {
            "README.md": card(name, found, tags, context),
            "MLmodel": mlmodel(found.folder, found.artifact.manifest.made_by.get("python")),
        }
        digests = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in texts.items()}
        for path in sorted(path for path in found.folder.rglob("*") if path.is_file()):
            digests[path.relative_to(found.folder).as_posix()] = _digest(found.artifact, path)
        if found.picture is not None and found.evaluation is not None:
            digests[PICTURE] = _digest(found.evaluation, found.picture)
        return DesiredVersion(found, name, texts, digests, tags)

    def _chosen(self, context: Context) -> list[Trained]:
        models = trained(context.stages, _of_models(context.names))
        for error in mistakes(models, self.names):
            raise UserError(error.what, where=f"stages.{context.name}.{error.where}", hint=error.hint)
        return chosen(models, self.names)


def _of_models(names: Mapping[str, str]) -> dict[str, str]:
    """The roles of inputs that may have models, with the names of their stages."""
    return {role: name for role, name in names.items() if role != EVALUATION}


def _digest(artifact: Artifact, path: Path) -> str:
    """The sha256 of a file of an artifact: as it is on record, so that nothing is read once more."""
    entry = artifact.manifest.files.get(path.relative_to(artifact.path).as_posix())
    return entry.sha256 if entry else DIGESTS.of(path)


def _weights_digest(digests: Mapping[str, str]) -> str:
    """The sha256 of a model's weights; of several files one sha256 of them all."""
    from orchestrator.tracking.model_files import content_digest

    weights = {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}
    return next(iter(weights.values())) if len(weights) == 1 else content_digest(weights)


def _fresh_copy(desired: DesiredVersion, context: Context) -> Path:
    """A copy to lay the card into; the artifact itself is never written to."""
    folder = inside(context.work, desired.known.model.name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(desired.known.folder, folder)
    for name, text in desired.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if desired.known.picture is not None:
        shutil.copyfile(desired.known.picture, folder / PICTURE)
    return folder


def _outcome(decisions: Sequence[Decision]) -> dict[str, Any]:
    """What is on record of a decision; nothing where there was no gate and the alias was set."""
    return {
        key: value
        for decision in decisions
        if decision.judged or decision.standing == "rolled back"
        for key, value in (
            ("standing", decision.standing),
            ("conditions", [str(one) for one in decision.judged]),
        )
    }


# --- conditions that cannot be decided --------------------------------------------------------------------------


def _no_evaluation(condition: str) -> UserError:
    return UserError(
        f"the condition `{condition}` needs an evaluation, and there is none",
        where="needs",
        hint="add a stage of kind evaluate to its `needs`",
    )


def _unscored(model: Trained, evaluation: str) -> UserError:
    return UserError(
        f"conditions cannot be decided for {model.name!r}: {evaluation} does not evaluate the stage {model.stage!r}",
        where="conditions",
        hint=f"add {model.stage} to the `needs` of {evaluation}, or leave the model out by `names`",
    )


def _undecidable(condition: Condition, evaluation: Stage, models: Sequence[Trained]) -> UserError | None:
    """What is wrong with a condition: a metric, or a baseline of it, that the evaluation does not compute."""
    for model in models:
        metrics = evaluation.scored(model.kind)
        if not any(condition.metric == one or condition.metric.startswith(f"{one}/") for one in metrics):
            close = nearest(condition.metric, metrics)
            there = f"there are {', '.join(metrics)}" if metrics else "it computes none of it"
            return UserError(
                f"the evaluation computes no {condition.metric!r} of {model.name!r} ({model.kind})",
                where="conditions",
                hint=f"did you mean {close!r}?" if close else there,
            )
    baseline = condition.against
    if isinstance(baseline, str) and baseline != CHAMPION and not has_baseline(condition.metric, baseline):
        return UserError(
            f"the evaluation computes no {condition.metric!r} of {baseline}",
            where="conditions",
            hint=f"compare it with a number or with {CHAMPION}, or compare knn with {baseline}",
        )
    return None
