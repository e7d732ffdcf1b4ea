"""The best checkpoint so far as a version in the model registry, with an alias that is the watcher's own."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import UserError, shortened
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.watch.choice import Best, CheckpointScore, goodness
from orchestrator.stages.common.mlmodel import mlmodel
from orchestrator.stages.publish.config import RESERVED, Publish
from orchestrator.tracking import registry
from orchestrator.tracking.aliases import CHALLENGER, AliasedVersion, Gate, Judged
from orchestrator.tracking.references import CHAMPION
from orchestrator.tracking.run import Run

BEST_SO_FAR = "best-so-far"
# On a version that a watcher registered: the key of the training, the figure that it was chosen by, and its value.
_WATCHED, _BY, _VALUE = "orchestrator.watch", "orchestrator.watch.by", "orchestrator.watch.value"
# As `alias` of a `publish` stage.
_ALIAS = re.compile(r"[A-Za-z][\w\-]*")
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,199}")


@dataclass(frozen=True)
class Registering:
    """Where the best checkpoint so far is registered.

    Attributes:
        name: of the registered model.
        alias: that moves to each better version.
    """

    name: str
    alias: str = BEST_SO_FAR

    def check(self, loaded: LoadedPipeline) -> None:
        """Look, before anything is scored, at the names.

        Raises:
            UserError: a name or alias that a registry cannot have, or an alias that is somebody else's.
        """
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"{shortened(self.name, 80)!r} is not the name of a registered model",
                where="--register",
                hint="use letters, digits, dots, dashes and underscores",
            )
        if not _ALIAS.fullmatch(self.alias) or RESERVED.fullmatch(self.alias):
            raise UserError(
                f"{shortened(self.alias, 80)!r} cannot be an alias: it begins with a letter and has letters, digits, "
                "dashes and underscores, and MLflow reserves latest and names such as v1",
                where="--alias",
                hint=f"leave it out: the alias is {BEST_SO_FAR}",
            )
        stages = loaded.spec.stages.items()
        published = {stage.alias: name for name, stage in stages if isinstance(stage, Publish)}
        owner = f"stage {published[self.alias]!r}" if self.alias in published else "`publish`"
        if self.alias in {CHAMPION, CHALLENGER, *published}:
            raise UserError(
                f"the alias {self.alias} is that of {owner}, and a watcher does not move it",
                where="--alias",
                hint=f"leave it out: the alias is {BEST_SO_FAR}",
            )

    def named(self, student: str) -> Registering:
        """The same for one of several students."""
        return Registering(f"{self.name}-{student}", self.alias)

    def check_holder(self, uri: str) -> None:
        """See, before anything is scored, that the registry answers and that the alias is a watcher's, if it is there.

        Raises:
            UserError: it does not, or another program set the alias.
        """
        self._own(registry.holder(uri, self.name, self.alias))

    def _own(self, holder: AliasedVersion | None) -> AliasedVersion | None:
        if holder is not None and _WATCHED not in holder.tags:
            raise UserError(
                f"{self.name}@{self.alias} is version {holder.version}, which no watcher registered: it is left alone",
                where="--alias",
                hint="choose another alias, or another name for --register",
            )
        return holder

    def put(
        self, run: Run, model: Path, score: CheckpointScore, best: Best, origin: Origin, scratch: Path
    ) -> str:
        """Register a model folder, and move the alias to it if what has it is not better.

        Args:
            run: of the watcher.
            model: the folder.
            score: of it.
            best: the same checkpoint, and the figure by which it is the best.
            origin: what the model comes from.
            scratch: a folder that nobody else uses.

        Returns:
            What became of it, for people.

        Raises:
            UserError: the registry cannot be reached, or another program has set the alias meanwhile.
        """
        assert run.tracking_uri is not None, "pipelines are always tracked"
        there = self._own(registry.holder(run.tracking_uri, self.name, self.alias))
        if there is not None and _is_better(there, best, origin.key):
            return f"{self.name}@{self.alias} stays version {there.version}, which is at least as good"
        tags = {
            **origin.tags,
            _WATCHED: origin.key,
            _BY: best.name,
            _VALUE: repr(best.figure.value),
            "orchestrator.step": str(score.step),
        }
        folder = self._laid_out(model, score, tags, scratch)

        def own(version: int, holder: AliasedVersion | None) -> Sequence[Judged]:
            self._own(holder)
            return ()

        number = registry.publish(
            run,
            self.name,
            folder,
            tags,
            self.alias,
            facts=registry.Facts(
                kind=origin.preset(model),
                params={name.removeprefix("orchestrator."): value for name, value in tags.items()},
                metrics={
                    name: figure.value
                    for name, figure in score.figures.items()
                    if math.isfinite(figure.value)
                },
                step=score.step,
            ),
            gate=Gate(judge=own),
        )
        return f"{self.name}@{self.alias} is version {number}"

    def _laid_out(self, model: Path, score: CheckpointScore, tags: dict[str, str], scratch: Path) -> Path:
        """A copy of the model with what `publish` lays beside one: a card and MLflow's description."""
        folder = scratch / "registered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder)
        (folder / "README.md").write_text(_card(self.name, score, tags), encoding="utf-8")
        (folder / "MLmodel").write_text(mlmodel(folder), encoding="utf-8")
        return folder


@dataclass(frozen=True)
class Origin:
    """What a checkpoint comes from.

    Attributes:
        pipeline: its name.
        stage: the name of the stage.
        student: of the stage; empty if the stage has one model.
        key: of the stage, or of the student.
    """

    pipeline: str
    stage: str
    student: str
    key: str

    @property
    def tags(self) -> dict[str, str]:
        """As `publish` has them on a version. The key of an artifact is not among them: there is none yet."""
        found = {"orchestrator.pipeline": self.pipeline, "orchestrator.stage": self.stage}
        return {**found, "orchestrator.student": self.student} if self.student else found

    def preset(self, model: Path) -> str:
        """The architecture of a model folder."""
        return str(json.loads((model / "config.json").read_text(encoding="utf-8"))["preset"])


def _is_better(there: AliasedVersion, best: Best, key: str) -> bool:
    """Whether the version with the alias is of the same training, chosen by the same figure, and at least as good."""
    if there.tags.get(_WATCHED) != key or there.tags.get(_BY) != best.name:
        return False
    try:
        value = float(there.tags.get(_VALUE, ""))
    except ValueError:
        return False
    return goodness(best.name, value) >= goodness(best.name, best.figure.value)


def _card(name: str, score: CheckpointScore, tags: dict[str, str]) -> str:
    """A card that says that the training was not over."""
    origin = tags["orchestrator.stage"]
    if "orchestrator.student" in tags:
        origin += f", student {tags['orchestrator.student']},"
    lines = [
        f"# {name}",
        "",
        f"A checkpoint of stage {origin} of the pipeline {tags['orchestrator.pipeline']} after {score.step:,} steps. "
        "`orchestrator watch` registered it as the best so far: the training may have gone on since.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {figure} | {value} |" for figure, value in score.figures.items()),
    ]
    return "\n".join(lines) + "\n"
