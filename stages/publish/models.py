"""The models that can be published: all that the stages say they made, by the name that each is published under."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError, nearest
from orchestrator.stages.base import PACKAGE, Context, Stage, figures_of
from orchestrator.stages.common.scores import KNN, Scores, read_scores
from orchestrator.storage.artifacts import Artifact

STUDENTS, EVALUATION = "students", "evaluation"


@dataclass(frozen=True)
class Trained:
    """A model of a stage.

    Attributes:
        name: after the pipeline's name, that of the registered model: a student's own, else its stage's, with its own
            if the stage has several.
        own: its name in its stage; empty for the only one.
        role: of the input that has it.
        stage, kind: its stage's name in the pipeline file, and its kind.
        place: its folder in the stage's artifact.
        names: of all models of the stage.
    """

    name: str
    own: str
    role: str
    stage: str
    kind: str
    place: str
    names: tuple[str, ...]

    @property
    def is_student(self) -> bool:
        """Whether it is one of the students of a stage, which are known by their own names."""
        return self.role == STUDENTS


def trained(stages: Mapping[str, Stage], names: Mapping[str, str]) -> list[Trained]:
    """All models of the stages that fill the inputs, in the order of the inputs.

    Args:
        stages: by role.
        names: of the stages in the pipeline file, by role.
    """
    found = []
    for role, stage_name in names.items():
        models = stages[role].models()
        for own, place in sorted(models.items()):
            name = own if role == STUDENTS else f"{stage_name}-{own}" if own else stage_name
            kind = stages[role].kind
            found.append(Trained(name, own, role, stage_name, kind, place, tuple(models)))
    return found


def chosen(models: Sequence[Trained], names: Sequence[str]) -> list[Trained]:
    """Those of some names, in their order; all if there are none."""
    by_name = {model.name: model for model in models}
    return [by_name[name] for name in dict.fromkeys(names)] if names else list(models)


def mistakes(models: Sequence[Trained], names: Sequence[str]) -> Iterator[UserError]:
    """What is wrong with the models to publish; `where` is the field of the stage."""
    if not models:
        yield UserError(
            "there is no model to publish",
            where="needs",
            hint="add a stage that makes one, such as one of kind distill or pretrain",
        )
        return
    known = [model.name for model in models]
    for name in dict.fromkeys(names):
        if name not in known:
            yield _unknown(name, models)
    for name in sorted({name for name in known if known.count(name) > 1}):
        both = " and ".join(model.stage for model in models if model.name == name)
        yield UserError(
            f"two models would be published as {name!r}: of the stages {both}",
            where="needs",
            hint="rename one of them",
        )


def _unknown(name: str, models: Sequence[Trained]) -> UserError:
    known = sorted(model.name for model in models)
    near = nearest(name, known)
    what = "student" if all(model.is_student for model in models) else "model"
    return UserError(
        f"there is no {what} {name!r} to publish",
        where="names",
        hint=f"did you mean {near!r}?" if near else f"there are: {', '.join(known)}",
    )


# --- what is known of a model once it is there ------------------------------------------------------------------


@dataclass(frozen=True)
class KnownModel:
    """A model in its artifact, with what is known of it.

    Attributes:
        model: what it is.
        artifact: that has it.
        config: of its folder.
        scores: of the evaluation; None if there is none, or it did not look at this model.
        evaluation: that has them.
    """

    model: Trained
    artifact: Artifact
    config: Mapping[str, Any]
    scores: Scores | None
    evaluation: Artifact | None

    @property
    def folder(self) -> Path:
        """Its weights and config."""
        return self.artifact.path / self.model.place

    @property
    def preset(self) -> str:
        """The name of its architecture; of a model for images and texts the kind of its stage."""
        return str(self.config.get("preset", self.model.kind))

    @property
    def picture(self) -> Path | None:
        """The evaluation's picture of its feature maps."""
        if self.evaluation is None or self.scores is None or self.scores.picture is None:
            return None
        return self.evaluation.path / self.scores.picture

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of its training, and its k-NN accuracy if it was evaluated."""
        own = figures_of(self.model.own, self.model.names, self.artifact.manifest.summary)
        # As the tag has it.
        return {**own, **({"knn_accuracy": round(self._knn, 4)} if self._knn is not None else {})}

    @property
    def _knn(self) -> float | None:
        return self.scores.metrics.get(KNN) if self.scores is not None else None

    def knn_tags(self) -> dict[str, str]:
        """Its k-NN accuracy and how it was measured."""
        if self.scores is None or self._knn is None:
            return {}
        how = f"leave-one-out, k={self.scores.k}"
        if self.scores.chosen is not None:
            how = f"test photos, {self.scores.chosen}"
        return {
            "orchestrator.knn_accuracy": f"{self._knn:.4f}",
            "orchestrator.knn": f"{how}, n={self.scores.num_photos}",
        }


def look_up(context: Context, model: Trained) -> KnownModel:
    """A model as the artifacts of a stage's inputs have it.

    Raises:
        UserError: it is not there.
    """
    artifact, evaluation = context.inputs[model.role], context.inputs.get(EVALUATION)
    config = artifact.path / model.place / "config.json"
    if not config.is_file():
        raise UserError(
            f"stage {model.stage!r} has no model in {model.place}",
            where=str(artifact.path),
            hint=f"make it again: orchestrator run FILE --force {model.stage}",
        )
    scores = read_scores(evaluation, artifact, model.own) if evaluation is not None else None
    return KnownModel(model, artifact, json.loads(config.read_text(encoding="utf-8")), scores, evaluation)


def upstream_of(artifact: Artifact) -> dict[str, str]:
    """The keys of the stages that led to an artifact, by name, as they were when it was made."""
    found = artifact.manifest.provenance.get("upstream")
    return {str(name): str(key) for name, key in found.items()} if isinstance(found, dict) else {}


def lineage(context: Context, known: KnownModel) -> dict[str, str]:
    """Tags that say what a model is and came from; the same artifacts always have the same tags."""
    model, artifact = known.model, known.artifact
    parts = artifact.manifest.provenance.get("parts", {})
    if model.is_student:
        own, keys = {"orchestrator.student": model.own, "orchestrator.students": artifact.key}, context.keys
    else:
        own = {"orchestrator.stage": model.stage, "orchestrator.key": artifact.key}
        # Of what led to it alone: a change of the students is none of their teacher.
        keys = upstream_of(artifact)
        own |= {"orchestrator.name": model.own} if model.own else {}
    tags = {
        "orchestrator.pipeline": context.pipeline,
        "orchestrator.model": known.preset,
        **own,
        **{f"orchestrator.key.{name}": key for name, key in keys.items()},
    }
    if "index" in parts.get("inputs", {}):
        tags["orchestrator.index"] = parts["inputs"]["index"]
    code = artifact.manifest.provenance.get("code")
    if isinstance(code, dict) and code.get("digest"):
        tags["orchestrator.code"] = code["digest"]
    # Not that of the process that publishes: an upgrade would register the same weights once more.
    if version := artifact.manifest.made_by.get(PACKAGE):
        tags["orchestrator.version"] = version
    return tags | known.knn_tags()
