"""Depth by ridge regression of patch features. The features stream through: memory does not grow with the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from orchestrator.config.dense import DepthData
from orchestrator.data.dense import DensePictures, Target
from orchestrator.data.splits import Splits
from orchestrator.data.views import Side
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Features, Figure, Metric
from orchestrator.evaluation.metrics.bootstrap import Sums, figure, ratio
from orchestrator.evaluation.metrics.linear_probe import Decay
from orchestrator.evaluation.metrics.patch_grid import enlarged, maps_of, mean_where, side_for

Floats = NDArray[np.float64]

# No camera measures nearer; a ratio to nothing would be infinite.
_NEAREST = 1e-3
_DELTA = 1.25
# Test pictures that are drawn, and their side in pixels.
_PICTURES, _PICTURE_SIDE = 3, 224


class LinearDepth(Metric):
    """Errors of depth, in metres, by ridge regression of patch features, on test pictures at their own resolution."""

    of_pixels: ClassVar[bool] = True
    has_photos: ClassVar[bool] = True

    data: DepthData = Field(description="The pictures and depth maps.")
    size: Side | None = Field(
        None,
        description="The side of the pictures, in pixels, rounded to whole patches. Default: each model's size.",
    )
    decay: tuple[Decay, ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        min_length=1,
        description="The weight decays to choose from on validation, for a mean squared error on features with "
        "standard deviation 1.",
    )
    _opened: tuple[DensePictures, Splits] | None = PrivateAttr(None)
    # Truth and guess of the first test pictures, of the model that was measured last.
    _shown: list[tuple[NDArray[Any], NDArray[Any]]] = PrivateAttr(default_factory=list)

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Metric`: pictures and depth maps, with their names."""
        try:
            return self.data.in_key("data")
        except UserError:
            return {"data": ()}  # `check` says what is missing

    def check(self) -> None:
        """See :class:`Metric`: pieces that are missing, maps of other sizes, depth in other units."""
        DensePictures(self.data).check()

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`rmse` in metres and `abs_rel` over all pixels, and `delta_1`, the share within a factor of 1.25."""
        size = side_for(self.size or features.size, features.patch)
        sums: _Moments | None = None
        for map_hwD, depth in self._maps(features, size, "train"):
            y = mean_where(depth, depth > 0, (map_hwD.shape[0], map_hwD.shape[1]))
            x = map_hwD.reshape(-1, map_hwD.shape[-1]).astype(np.float64)
            sums = sums or _Moments.zero(x.shape[1])
            sums.add(x[np.isfinite(y)], y[np.isfinite(y)])
        assert sums is not None, "no split is empty"
        if not sums.count:
            raise self._no_depth("train")
        fits = [sums.ridge(decay) for decay in self.decay]
        on_validation = self._parts(features, size, "validation", fits)
        errors = [float(_rmse(parts.sum(axis=0, keepdims=True))[0]) for parts in on_validation]
        best = int(np.argmin(errors))
        (parts,) = self._parts(features, size, "test", [fits[best]])
        return _figures(
            parts, features.seed, f"decay={self.decay[best]:g}, {size} px, validation {errors[best]:.3g}"
        )

    def picture(self, path: Path) -> bool:
        """See :class:`Metric`: true and given depth of the first test pictures."""
        if self._opened is None or not self._shown:
            return False
        from orchestrator.evaluation.report.dense_pictures import depth_maps

        pictures, splits = self._opened
        photos = (photo for photo, _ in pictures.squares(splits.test[: len(self._shown)], _PICTURE_SIDE))
        depth_maps([(photo, *maps) for photo, maps in zip(photos, self._shown, strict=True)], path)
        return True

    def floor(self, features: Features) -> tuple[str, Mapping[str, float | Figure]]:
        """Always the mean depth of the training pictures."""
        pictures, splits = self._open(features)
        total = count = 0.0
        for _, depth in pictures.squares(splits.train, 8, features.check):
            total, count = (
                total + float(depth[depth > 0].sum(dtype=np.float64)),
                count + float((depth > 0).sum()),
            )
        if not count:
            raise self._no_depth("train")
        mean = total / count
        parts = np.stack(
            [
                depth_parts(np.full(depth.shape, max(mean, _NEAREST)), depth)
                for _, depth in pictures.squares(splits.test, 8, features.check)
            ]
        )
        if not parts[:, -1].any():
            raise self._no_depth("test")
        return "mean depth", _figures(parts, features.seed, f"always {mean:.3g} m")

    def _open(self, features: Features) -> tuple[DensePictures, Splits]:
        if self._opened is None:
            pictures = DensePictures(self.data)
            self._opened = pictures, pictures.splits(str(self.data.path), features.check)
        return self._opened

    def _maps(
        self, features: Features, size: int, split: Any
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
        pictures, splits = self._open(features)
        return maps_of(features, pictures, splits[split], size)

    def _parts(self, features: Features, size: int, split: Any, fits: list[_Ridge]) -> list[Floats]:
        """For each fit, of each picture what :func:`depth_parts` gives, (N, 4)."""
        found: list[list[Floats]] = [[] for _ in fits]
        self._shown.clear()
        for map_hwD, depth in self._maps(features, size, split):
            for at, fit in enumerate(fits):
                guess = enlarged(fit(map_hwD)[..., None], (depth.shape[0], depth.shape[1]))[..., 0]
                guess = guess.clip(_NEAREST, self.data.max_depth)
                found[at].append(depth_parts(guess, depth))
                if at == 0 and len(self._shown) < _PICTURES:
                    self._shown.append((depth, guess))
        if not any(parts[-1] for parts in found[0]):
            raise self._no_depth(split)
        return [np.stack(parts) for parts in found]

    def _no_depth(self, split: str) -> UserError:
        return UserError(
            f"no picture of {split} has depth that counts",
            where=str(self.data.path),
            hint="see `scale` and `max_depth` of the data, or split the pictures otherwise",
        )


@dataclass(frozen=True)
class _Ridge:
    """Depth as a linear function of features."""

    weights_D: Floats
    bias: float

    def __call__(self, map_hwD: NDArray[np.float32]) -> Floats:
        guess: Floats = map_hwD @ self.weights_D + self.bias
        return guess


@dataclass
class _Moments:
    """Sums over patches that a ridge regression needs, and nothing else of them."""

    count: int
    x_D: Floats
    y: float
    xx_DD: Floats
    xy_D: Floats

    @classmethod
    def zero(cls, dim: int) -> _Moments:
        return cls(0, np.zeros(dim), 0.0, np.zeros((dim, dim)), np.zeros(dim))

    def add(self, x_ND: Floats, y_N: Floats) -> None:
        self.count += len(x_ND)
        self.x_D += x_ND.sum(axis=0)
        self.y += float(y_N.sum())
        self.xx_DD += x_ND.T @ x_ND
        self.xy_D += x_ND.T @ y_N

    def ridge(self, decay: float) -> _Ridge:
        """The minimum of the mean squared error plus `decay` times the squared norm, of features with deviation 1."""
        mean_D, mean_y = self.x_D / self.count, self.y / self.count
        covariance_DD = self.xx_DD / self.count - np.outer(mean_D, mean_D)
        std_D = np.sqrt(np.maximum(np.diag(covariance_DD), 0))
        # A channel that never changes says nothing; its rounding errors must not grow.
        inverse_D = np.divide(
            1, std_D, out=np.zeros_like(std_D), where=std_D > 1e-6 * max(std_D.max(), 1e-12)
        )
        scaled_DD = covariance_DD * np.outer(inverse_D, inverse_D)
        right_D = (self.xy_D / self.count - mean_D * mean_y) * inverse_D
        weights_D = np.linalg.solve(scaled_DD + decay * np.eye(len(right_D)), right_D) * inverse_D
        return _Ridge(weights_D, float(mean_y - mean_D @ weights_D))


def depth_parts(guess_HW: NDArray[np.floating[Any]], truth_HW: Target) -> Floats:
    """Sums over the pixels with depth: squared error, relative error, hits of δ1, and how many pixels, (4,)."""
    there = truth_HW > 0
    guess, truth = guess_HW[there].astype(np.float64), truth_HW[there].astype(np.float64)
    ratio_N = np.maximum(guess / truth, truth / guess)
    error_N = guess - truth
    return np.array(
        [(error_N**2).sum(), (np.abs(error_N) / truth).sum(), (ratio_N < _DELTA).sum(), len(truth)],
        dtype=np.float64,
    )


def _rmse(sums_B4: Sums) -> NDArray[np.float64]:
    return np.sqrt(ratio(sums_B4[:, [0, 3]]))


def _figures(parts_N4: Floats, seed: int, note: str) -> dict[str, float | Figure]:
    return {
        "rmse": figure(parts_N4, _rmse, "test", seed, note),
        "abs_rel": figure(parts_N4[:, [1, 3]], ratio, "test", seed, note),
        "delta_1": figure(parts_N4[:, [2, 3]], ratio, "test", seed, note),
    }
