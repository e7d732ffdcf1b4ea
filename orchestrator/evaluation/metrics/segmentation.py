"""Semantic segmentation by a linear classifier of patch features: what the dense features are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from orchestrator.config.dense import MaskData, in_key
from orchestrator.config.split import SPLITS
from orchestrator.data.dense import DensePictures
from orchestrator.data.rng import generator
from orchestrator.data.sources.masks import mask_pairs
from orchestrator.data.splits import Splits
from orchestrator.data.views import Side
from orchestrator.errors import UserError, shortened
from orchestrator.evaluation.metric import Features, Figure, Metric
from orchestrator.evaluation.metrics.bootstrap import Sums, figure, ratio
from orchestrator.evaluation.metrics.linear_probe import DECAYS, Decay, Scale, path, scores
from orchestrator.evaluation.metrics.patch_grid import class_counts, enlarged, maps_of, side_for

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Maps = NDArray[np.float32]

# Test pictures that are drawn, and their side in pixels.
_PICTURES, _PICTURE_SIDE = 3, 224


@dataclass(frozen=True)
class _Opened:
    """The data set, looked through once for all models. `classes_C` are the numbers of the training masks' classes."""

    pictures: DensePictures
    splits: Splits
    classes_C: NDArray[np.int64]
    pixels_C: NDArray[np.int64]


class LinearSegmentation(Metric):
    """Mean intersection over union of a linear classifier of patches, on test pictures at their own resolution."""

    of_pixels: ClassVar[bool] = True
    has_photos: ClassVar[bool] = True

    data: MaskData = Field(description="The pictures and masks.")
    size: Side | None = Field(
        None,
        description="The side of the pictures, in pixels, rounded to whole patches. Default: each model's size.",
    )
    decay: tuple[Decay, ...] = Field(
        DECAYS, min_length=1, description="The weight decays to choose from on validation."
    )
    max_patches: int = Field(
        20_000,
        ge=10,
        description="The maximum number of patches to train on, the same number from each picture.",
    )
    max_iterations: int = Field(
        200, ge=1, description="The maximum number of L-BFGS iterations for each decay."
    )
    _opened: _Opened | None = PrivateAttr(None)
    # Truth and guess of the first test pictures, of the model that was measured last.
    _shown: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = PrivateAttr(default_factory=list)

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Metric`: pictures and masks, with their names."""
        return in_key(self.data.path, _listed(self.data), self.data.split, "data")

    def check(self) -> None:
        """See :class:`Metric`: pieces that are missing, and masks of other sizes."""
        DensePictures(self.data).check()

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`mean_iou` over the classes that are there, and `pixel_accuracy`."""
        opened = self._open(features)
        size = side_for(self.size or features.size, features.patch)
        x, y, weights = self._samples(opened, features, size)
        scale = Scale.of(x)
        probes = list(path(scale(x), y, self.decay, self.max_iterations, weights))
        chosen, decay, best = probes[0][0], probes[0][1], -1.0
        on_validation = [
            np.concatenate(parts)
            for parts in self._parts(
                opened, features, size, "validation", scale, [probe for probe, _ in probes]
            )
        ]
        for (probe, of), parts in zip(probes, on_validation, strict=True):
            found = float(mean_iou(parts.sum(axis=0, keepdims=True))[0])
            if found > best:
                chosen, decay, best = probe, of, found
        (parts_list,) = self._parts(opened, features, size, "test", scale, [chosen])
        note = f"decay={decay:g}, {size} px, validation {best:.3f}"
        return _figures(np.concatenate(parts_list), features.seed, note)

    def picture(self, path: Path) -> bool:
        """See :class:`Metric`: true and given classes of the first test pictures."""
        if self._opened is None or not self._shown:
            return False
        from orchestrator.evaluation.report.dense_pictures import class_maps

        rows = self._opened.splits.test[: len(self._shown)]
        photos = (photo for photo, _ in self._opened.pictures.squares(rows, _PICTURE_SIDE))
        shown = [(photo, *maps) for photo, maps in zip(photos, self._shown, strict=True)]
        class_maps(shown, len(self._opened.classes_C), path)
        return True

    def floor(self, features: Features) -> tuple[str, Mapping[str, float | Figure]]:
        """Always the class that most training pixels have."""
        opened = self._open(features)
        largest = int(opened.pixels_C.argmax())
        parts = []
        for _, target in opened.pictures.squares(opened.splits.test, 8, features.check):
            truth = _numbered(target, opened.classes_C)
            parts.append(iou_parts(np.full_like(truth, largest), truth, len(opened.classes_C)))
        return "largest class", _figures(
            np.stack(parts), features.seed, f"always {opened.classes_C[largest]}"
        )

    def _open(self, features: Features) -> _Opened:
        """The pictures, their splits and their classes.

        Raises:
            UserError: as :func:`Splits.of`; one class only; or classes that training has not.
        """
        if self._opened is None:
            where = str(self.data.path)
            pictures = DensePictures(self.data)
            splits = pictures.splits(where, features.check)
            counts: dict[str, dict[int, int]] = {}
            for name in ("train", "validation", "test"):
                of = counts[name] = {}
                for _, target in pictures.squares(splits[name], 8, features.check):
                    for number, count in zip(*np.unique(target, return_counts=True), strict=True):
                        of[int(number)] = of.get(int(number), 0) + int(count)
                of.pop(-1, None)
            learned = counts["train"]
            if len(learned) < 2:
                only = f"only the class {next(iter(learned))}" if learned else "no class"
                raise UserError(
                    f"the masks of the {len(splits.train):,} training pictures have {only}",
                    where=where,
                    hint=f"masks hold the number of a class in each pixel; {self.data.ignored} does not count",
                )
            for name in SPLITS[1:]:
                if not counts[name]:
                    raise UserError(
                        f"no pixel of the {len(splits[name]):,} masks of {name} counts",
                        where=where,
                        hint=f"{self.data.ignored} does not count: see `ignore`, or split the pictures otherwise",
                    )
                if unseen := sorted(set(counts[name]) - set(learned)):
                    raise UserError(
                        f"masks of {name} have classes that those of train lack: "
                        f"{shortened(', '.join(map(str, unseen)), 200)}",
                        where=where,
                        hint="put pictures of each class into train, give the split another `seed`, or set `ignore`",
                    )
            classes_C = np.array(sorted(learned), dtype=np.int64)
            self._opened = _Opened(
                pictures, splits, classes_C, np.array([learned[int(number)] for number in classes_C])
            )
        return self._opened

    def _samples(
        self, opened: _Opened, features: Features, size: int
    ) -> tuple[Maps, NDArray[np.int64], NDArray[np.float64]]:
        """Features of patches, a class that they have, and the share of their pixels that has it."""
        rng = generator(features.seed, "patches")
        most = max(1, self.max_patches // len(opened.splits.train))
        found: list[tuple[Maps, NDArray[np.int64], NDArray[np.float64]]] = []
        for map_hwD, target in maps_of(features, opened.pictures, opened.splits.train, size):
            truth = _numbered(target, opened.classes_C)
            counts_PC = class_counts(truth, map_hwD.shape[:2], len(opened.classes_C))
            pixels = truth.size / len(counts_PC)
            taken = rng.permutation(np.flatnonzero(counts_PC.any(axis=1)))[:most]
            at, of = np.nonzero(counts_PC[taken])
            flat_PD = map_hwD.reshape(-1, map_hwD.shape[-1])
            found.append((flat_PD[taken[at]], of, counts_PC[taken[at], of] / pixels))
        x, y, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return x, y, weights

    def _parts(
        self,
        opened: _Opened,
        features: Features,
        size: int,
        split: Any,
        scale: Scale,
        probes: list[LogisticRegression],
    ) -> list[list[NDArray[np.int64]]]:
        """For each classifier, of each picture what :func:`iou_parts` gives, (1, 3C)."""
        found: list[list[NDArray[np.int64]]] = [[] for _ in probes]
        self._shown.clear()
        for map_hwD, target in maps_of(features, opened.pictures, opened.splits[split], size):
            truth = _numbered(target, opened.classes_C)
            x = scale(map_hwD.reshape(-1, map_hwD.shape[-1]))
            for at, probe in enumerate(probes):
                logits = scores(probe, x).reshape(*map_hwD.shape[:2], -1)
                guess = probe.classes_[enlarged(logits, truth.shape).argmax(axis=-1)]
                found[at].append(iou_parts(guess, truth, len(opened.classes_C))[None])
                if at == 0 and len(self._shown) < _PICTURES:
                    self._shown.append((truth, guess))
        return found


def iou_parts(
    guess_HW: NDArray[np.int64], truth_HW: NDArray[np.int64], num_classes: int
) -> NDArray[np.int64]:
    """Pixels of each class that are right, guessed and true, (3C,); those whose truth is -1 do not count."""
    there = truth_HW >= 0
    guess, truth = guess_HW[there], truth_HW[there]
    return np.concatenate(
        [np.bincount(part, minlength=num_classes) for part in (truth[guess == truth], guess, truth)]
    )


def mean_iou(sums_B3C: Sums) -> NDArray[np.float64]:
    """The mean over classes of intersection by union, (B,); classes that are neither guessed nor there do not count."""
    right, guessed, true = np.split(sums_B3C, 3, axis=1)
    union = guessed + true - right
    iou = np.divide(right, union, out=np.full(right.shape, np.nan), where=union > 0)
    counted = np.isfinite(iou)
    found: NDArray[np.float64] = np.where(counted, iou, 0).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
    return found


def _figures(parts_N3C: NDArray[np.int64], seed: int, note: str) -> dict[str, float | Figure]:
    num_classes = parts_N3C.shape[1] // 3
    pixels = np.stack(
        [parts_N3C[:, :num_classes].sum(axis=1), parts_N3C[:, 2 * num_classes :].sum(axis=1)], axis=1
    )
    return {
        "mean_iou": figure(parts_N3C, mean_iou, "test", seed, note),
        "pixel_accuracy": figure(pixels, ratio, "test", seed, note),
    }


def _numbered(target: NDArray[Any], classes_C: NDArray[np.int64]) -> NDArray[np.int64]:
    """Classes by their place among those of training; -1 stays."""
    at = np.searchsorted(classes_C, target).clip(max=len(classes_C) - 1)
    return np.where(target < 0, -1, at)


def _listed(data: MaskData) -> list[tuple[str, str]]:
    """The pictures and masks; none where they are not whole, which :meth:`LinearSegmentation.check` tells."""
    try:
        return mask_pairs(data)
    except UserError:
        return []
