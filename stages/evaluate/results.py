"""What `evaluate` found: the scores by kind, and the figures taken from the histories. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.data.sources.account import Account
from orchestrator.evaluation.metric import Figure, Figures

History = Sequence[Mapping[str, Any]]
# By the metric's title, by the row of the model, by figure.
Measured = Mapping[str, Mapping[str, Mapping[str, float]]]

HEALTH = {"cls_patch_cosine": "CLS-patch cosine", "patch_locality": "patch locality"}
# A single step's figures depend on its few photos.
NUM_ENDS = 5
# Rows of models have names that begin or end so.
_STUDENT, _TEACHER = "student ", " (teacher)"


@dataclass(frozen=True)
class Score:
    """A row of the k-NN table. `family` is baseline, random weights, backbone, from elsewhere or student.

    `figure` is the accuracy of a plain vote with its interval. `weighted` is there with a split: the accuracy of a vote
    weighted by similarity, of test photos.
    """

    name: str
    family: str
    accuracy: float
    model: str = ""
    image_size: int | None = None
    dim: int | None = None
    num_parameters: int | None = None
    student: str | None = None
    figure: Figure | None = None
    weighted: Figure | None = None

    def record(self) -> dict[str, Any]:
        """The row of `table.json`."""
        found = asdict(self)
        if self.figure is None:
            del found["figure"]
        if self.weighted is None:
            del found["weighted"]
        return found


@dataclass(frozen=True)
class ZeroShot:
    """Classes told by texts alone.

    Attributes:
        num_photos, num_classes: that took part.
        accuracy: with the mean of all templates' texts.
        by_template: with each template alone.
        majority: of always saying the largest class.
    """

    num_photos: int
    num_classes: int
    accuracy: Figure
    by_template: Mapping[str, Figure]
    majority: Figure

    def record(self) -> dict[str, Any]:
        """As in `table.json`."""
        return {
            "num_photos": self.num_photos,
            "num_classes": self.num_classes,
            "accuracy": self.accuracy.value,
            "by_template": {name: one.value for name, one in self.by_template.items()},
            "majority": self.majority.value,
            "intervals": {
                "accuracy": [self.accuracy.low, self.accuracy.high],
                "by_template": {name: [one.low, one.high] for name, one in self.by_template.items()},
                "majority": [self.majority.low, self.majority.high],
            },
        }


@dataclass(frozen=True)
class TextRetrieval:
    """Photos found by their captions and captions by their photos.

    Attributes:
        num_pairs: that took part.
        recalls: `image_to_text_recall_at_K` and `text_to_image_recall_at_K`.
        chance: recall at K of random ranking, by K.
    """

    num_pairs: int
    recalls: Mapping[str, Figure]
    chance: Mapping[int, float]

    def values(self) -> dict[str, float]:
        """All figures by name."""
        found = {"num_pairs": float(self.num_pairs)}
        found |= {name: one.value for name, one in self.recalls.items()}
        return found | {f"chance_recall_at_{k}": value for k, value in self.chance.items()}

    def record(self) -> dict[str, Any]:
        """As in `table.json`."""
        return {
            **self.values(),
            "intervals": {name: [one.low, one.high] for name, one in self.recalls.items()},
        }


@dataclass(frozen=True)
class ClusterDraws:
    """What came of a pool by cluster: its photos, or the draws of a stage.

    Attributes:
        name: of the pool, or of the stage.
        by_cluster: photos or draws by cluster.
        effective: how many equally frequent clusters have the entropy of these.
        left_out: share that the curation had left out.
    """

    name: str
    by_cluster: Mapping[int, int]
    effective: float
    left_out: float

    @property
    def total(self) -> int:
        """Photos or draws."""
        return sum(self.by_cluster.values())


@dataclass(frozen=True)
class Results:
    """Everything an evaluation found.

    Attributes:
        title: the pipeline's name.
        k: neighbours.
        num_unique: photos of the index.
        groups: label → photos that took part in the k-NN; empty if the photos have no labels.
        scores: rows of the k-NN table.
        backbones: history of each backbone stage by kind, in the order they ran.
        heads: history of every student and of the text alignment, by title.
        sharing: counters of the teacher service, if students were distilled.
        pca: PNG by the name of the score it belongs to.
        keys: content keys of the stages upstream, by name.
        retrieval: None without texts.
        zero_shot: None without texts or without labels.
        text_maps: PNG of where in photos texts are, or None.
        pool: the raw photos and the chosen ones by cluster.
        drawn: what stages drew, by kind and in the order they ran.
        num_from_scratch: photos that the backbone was trained on from nothing; 0 if it started from weights, or if
            there is none.
        accounts: what became of every file of the datasets.
        measured: figures of the stage's `metrics`.
        figures: the same with their intervals.
        split: photos by split; None for leave-one-out.
        drawn_by: PNG by the metric's title and the row of the model.
    """

    title: str
    k: int
    num_unique: int
    groups: Mapping[str, int]
    scores: Sequence[Score]
    backbones: Mapping[str, History]
    heads: Mapping[str, History]
    sharing: Mapping[str, float]
    pca: Mapping[str, Path]
    keys: Mapping[str, str]
    retrieval: TextRetrieval | None = None
    zero_shot: ZeroShot | None = None
    text_maps: Path | None = None
    pool: Sequence[ClusterDraws] = ()
    drawn: Mapping[str, ClusterDraws] = field(default_factory=dict)
    measured: Measured = field(default_factory=dict)
    num_from_scratch: int = 0
    accounts: Sequence[Account] = ()
    figures: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)
    split: Mapping[str, int] | None = None
    drawn_by: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)

    @property
    def num_photos(self) -> int:
        """Photos of the k-NN."""
        return sum(self.groups.values())

    @property
    def teacher(self) -> Score | None:
        """The last backbone, if it taught the students or there are none."""
        return self.last("backbone")

    def last(self, family: str) -> Score | None:
        """The last row of a family, if there is one."""
        return next((score for score in reversed(self.scores) if score.family == family), None)

    @property
    def students(self) -> dict[str, Score]:
        """The students' scores by name."""
        return {score.student: score for score in self.scores if score.student is not None}

    def untrained(self, score: Score | None) -> Score | None:
        """Random weights of the model of `score`, at its size of photos."""
        if score is None:
            return self.named("random weights", 0)
        of = (score.model, score.image_size)
        return next(
            (
                one
                for one in self.scores
                if one.family == "random weights" and (one.model, one.image_size) == of
            ),
            None,
        )

    def named(self, family: str, at: int) -> Score | None:
        """Row `at` of a family, if there is one."""
        members = [score for score in self.scores if score.family == family]
        return members[at] if at < len(members) else None

    def summary(self) -> dict[str, float]:
        """The figures for one line."""
        rows = {
            **{f"knn_{name}": score for name, score in self.students.items()},
            "knn_majority": self.named("baseline", 0),
            "knn_raw_pixels": self.named("baseline", 1),
            "knn_random": self.named("random weights", 0),
            "knn_teacher": self.teacher,
        }
        figures = {name: score.accuracy for name, score in rows.items() if score is not None}
        for name in ("image_to_text_recall_at_5", "text_to_image_recall_at_5"):
            figures |= {name: self.retrieval.recalls[name].value} if self.retrieval else {}
        figures |= {"zero_shot": self.zero_shot.accuracy.value} if self.zero_shot else {}
        return {"photos": float(self.num_photos), **figures, **self._measured_summary()}

    def metrics(self) -> dict[str, float]:
        """Every figure by a name that tracking accepts."""
        figures = self._knn_metrics()
        if self.retrieval is not None:
            figures |= {f"retrieval/{name}": value for name, value in self.retrieval.values().items()}
            for name, one in self.retrieval.recalls.items():
                figures |= _ends("retrieval", name, one)
        if self.zero_shot is not None:
            figures["zero_shot/accuracy"] = self.zero_shot.accuracy.value
            figures |= _ends("zero_shot", "accuracy", self.zero_shot.accuracy)
        figures |= {f"clusters/{one.name}": one.effective for one in (*self.pool, *self.drawn.values())}
        for kind, health in self.health().items():
            figures |= {f"{name}/{kind}": ends["last"] for name, ends in health.items()}
        for metric, by_model in self.measured.items():
            for model, found in by_model.items():
                figures |= {f"{metric}/{figure}/{model}": value for figure, value in found.items()}
        for metric, by_row in self.figures.items():
            for row, named in by_row.items():
                for name, one in named.items():
                    figures |= _ends(f"{metric}/{name}", row, one)
        return {"num_photos": float(self.num_photos), **figures}

    def _knn_metrics(self) -> dict[str, float]:
        found = {}
        if self.split is None:
            for score in self.scores:
                found[f"knn/{score.name}"] = score.accuracy
                found |= _ends("knn", score.name, score.figure) if score.figure is not None else {}
            return found
        for score in self.scores:
            for name, figure in (("knn_test", score.figure), ("knn_weighted_test", score.weighted)):
                if figure is not None:
                    found[f"{name}/{score.name}"] = figure.value
                    found |= _ends(name, score.name, figure)
        return found

    def _measured_summary(self) -> dict[str, float]:
        """Of the stage's `metrics` the figures of the teacher and the students."""
        shown = {}
        for model in next(iter(self.measured.values()), {}):
            if model.startswith(_STUDENT):
                shown[model] = model.removeprefix(_STUDENT)
            elif model.endswith(_TEACHER):
                shown[model] = "teacher"
        return {
            f"{metric}_{figure}_{shown[model]}": value
            for metric, by_model in self.measured.items()
            for model, found in by_model.items()
            if model in shown
            for figure, value in found.items()
        }

    def health(self) -> dict[str, dict[str, dict[str, float]]]:
        """Kind → figure → first and last value (means over a few steps), of the stages that have records."""
        found = {}
        for kind, history in self.backbones.items():
            columns = {
                name: [row["metrics"][name] for row in history if name in row["metrics"]] for name in HEALTH
            }
            if all(columns.values()):
                found[kind] = {
                    name: {"first": _mean(values[:NUM_ENDS]), "last": _mean(values[-NUM_ENDS:])}
                    for name, values in columns.items()
                }
        return found


def file_name(title: str) -> str:
    """A metric's title as a part of the name of a file."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", title)


def _ends(metric: str, model: str, figure: Figure) -> dict[str, float]:
    """The ends of a figure's interval as metrics of their own."""
    if figure.low is None or figure.high is None:
        return {}
    return {f"{metric}/low/{model}": figure.low, f"{metric}/high/{model}": figure.high}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
