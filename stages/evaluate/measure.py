"""Which photos take part in an evaluation, what metrics get of each model, and what they gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.split import SPLITS
from orchestrator.data.index import ImageIndex
from orchestrator.data.splits import Splits
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Features, Figure, Metric, checked
from orchestrator.evaluation.metrics.knn import MAJORITY, Knn, majority
from orchestrator.stages.evaluate.results import Score
from orchestrator.stages.evaluate.towers import (
    Check,
    Crops,
    Floats,
    Tower,
    dense_maps,
    embed_at,
    found_boxes,
    patch_crops,
    pixel_maps,
)

RAW_PIXELS = "raw pixels"
# The numbers of neighbours that validation chooses from, beside the stage's own.
_CANDIDATES = (1, 5, 10, 20, 50)


@dataclass(frozen=True)
class Pool:
    """The photos that take part, in the order of their features.

    Attributes:
        index: all photos.
        rows: of the index.
        groups: label → photos that figures are of; empty if there are not two labels to tell apart.
        places: by split the places in `rows`; empty without a split.
    """

    index: ImageIndex
    rows: Sequence[int]
    groups: Mapping[str, int]
    places: Mapping[str, NDArray[np.int64]]

    @property
    def labels(self) -> list[str | None]:
        """Of each photo."""
        return [self.index[row].label for row in self.rows]


def pool_of(index: ImageIndex, splits: Splits | None, groups: Mapping[str, int], *, everything: bool) -> Pool:
    """The photos of the labels in `groups`, of a split if there are splits.

    Args:
        index: all photos.
        splits: None for leave-one-out.
        groups: label → photos, of those that are learned from.
        everything: whether photos take part where there are no groups.
    """
    labels = index.labels
    inside = {row: name for name in SPLITS for row in splits[name].tolist()} if splits is not None else {}
    rows = [
        row
        for row, label in enumerate(labels)
        if (label in groups or (everything and not groups)) and (splits is None or row in inside)
    ]
    if splits is None:
        return Pool(index, rows, groups, {})
    places: dict[str, NDArray[np.int64]] = {
        name: np.array([at for at, row in enumerate(rows) if inside[row] == name], dtype=np.int64)
        for name in SPLITS
    }
    counts = Counter(labels[rows[at]] for at in places["test"].tolist())
    return Pool(index, rows, {label: counts[label] for label in groups if counts[label]}, places)


def check_pool(pool: Pool, where: str) -> None:
    """Raises UserError where a split has none of the photos that take part."""
    for name, places in pool.places.items():
        if not len(places):
            raise UserError(
                f"no photo of {name} has one of the {len(pool.groups)} labels that are evaluated",
                where=where,
                hint="raise `num_groups`, or give this split a larger share",
            )


def features_of(
    name: str,
    family: str,
    tower: Tower,
    crops: Crops,
    cls_ND: Floats,
    pool: Pool,
    batch: int,
    seed: int,
    check: Check,
) -> Features:
    """What metrics get of a model."""
    return Features(
        name,
        family,
        cls_ND,
        labels=pool.labels,
        photos=_names(pool),
        seed=seed,
        patches=lambda: patch_crops(tower, crops.batches(tower.size, batch), len(crops.rows), check),
        splits=pool.places,
        size=tower.size,
        at_scale=lambda scale: embed_at(tower, crops, scale, batch, check),
        maps=partial(dense_maps, tower),
        patch=tower.patch,
        boxes=partial(found_boxes, tower) if tower.task == "detection" else None,
        classes=tower.predictor.classes if tower.predictor is not None else (),
        check=check,
    )


def of_pixels(cls_ND: Floats, pool: Pool, seed: int, check: Check, size: int = 0, patch: int = 1) -> Features:
    """What metrics get of raw pixels.

    Args:
        cls_ND: pixels of small crops of the photos.
        pool: the photos.
        seed, check: see :class:`Features`.
        size, patch: of the first model: patches of pixels are looked at as it sees them.
    """

    def patches() -> Floats:
        raise AssertionError("metrics that are computed of pixels use `maps`")

    return Features(
        RAW_PIXELS,
        "baseline",
        cls_ND,
        labels=pool.labels,
        photos=_names(pool),
        seed=seed,
        patches=patches,
        splits=pool.places,
        size=size,
        maps=partial(pixel_maps, patch=patch),
        patch=patch,
        check=check,
    )


def _names(pool: Pool) -> list[str]:
    return [f"{pool.index[row].source}/{pool.index[row].path}" for row in pool.rows]


@dataclass
class Measurements:
    """What metrics gave, by their titles, by row, by figure; and what they drew, by title and row."""

    figures: dict[str, dict[str, dict[str, Figure]]] = field(default_factory=dict)
    pictures: dict[str, dict[str, Path]] = field(default_factory=dict)

    def baselines(self, metric: Metric, pixels: Features) -> None:
        """Rows of an answer that looks at no picture, and of raw pixels, as far as they say something."""
        rows = self.figures.setdefault(metric.title, {})
        floor = metric.floor(pixels)
        if floor is not None:
            rows[floor[0]] = checked(metric, floor[1])
        if metric.of_pixels:
            rows[pixels.model] = checked(metric, metric.measure(pixels))

    def add(self, metric: Metric, features: Features) -> None:
        """The row of a model."""
        rows = self.figures.setdefault(metric.title, {})
        if found := checked(metric, metric.measure(features)):
            rows[features.model] = found

    def draw(self, metric: Metric, model: str, path: Path) -> None:
        """What a metric makes of a few pictures with the model that it measured last, if it draws something."""
        if metric.picture(path):
            self.pictures.setdefault(metric.title, {})[model] = path

    def values(self) -> dict[str, dict[str, dict[str, float]]]:
        """The figures as plain numbers."""
        return {
            title: {row: {name: one.value for name, one in found.items()} for row, found in by_row.items()}
            for title, by_row in self.figures.items()
        }


def score(features: Features, k: int, **known: object) -> Score:
    """A row of the k-NN table: leave-one-out with one vote each, or of test photos where there is a split.

    Args:
        features: of a model, or of raw pixels.
        k: of the stage.
        known: the other fields of the row.
    """
    if features.splits:
        return _split_score(features, k, **known)
    found = Knn(use="knn", vote="majority", k=(k,)).measure(features)["accuracy"]
    assert isinstance(found, Figure)
    return Score(features.model, features.family, found.value, figure=found, **known)  # type: ignore[arg-type]


def _split_score(features: Features, k: int, **known: object) -> Score:
    """Of both kinds of vote, with what validation chose; `k` is one of the candidates."""
    candidates = tuple(sorted({k, *_CANDIDATES}))
    plain, weighted = (
        Knn(use="knn", vote=vote, k=candidates).measure(features)["accuracy"]
        for vote in ("majority", "softmax")
    )
    assert isinstance(plain, Figure)
    assert isinstance(weighted, Figure)
    return Score(features.model, features.family, plain.value, figure=plain, weighted=weighted, **known)  # type: ignore[arg-type]


def floor(features: Features) -> Score:
    """The row of always giving the largest group."""
    found = majority(features)
    return Score(MAJORITY, "baseline", found.value, figure=found)
