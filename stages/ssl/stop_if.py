"""When training stops by itself: dense features, or k-NN, have become worse than they were at the start."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from pydantic import Field

from orchestrator.config.settings import Settings
from orchestrator.errors import UserError
from orchestrator.stages.common.lineage import Health
from orchestrator.stages.ssl.knn import KnnProbe

_FIRST = ("stop_first_cosine", "stop_first_locality")
_FIRST_KNN = "stop_first_knn"
_KNN_HOW = ("stop_first_knn_photos", "stop_first_knn_k")
_HINT = (
    "lower optimizer.lr.peak, raise freeze_backbone_steps or set gram; larger amounts in stop_if continue from the "
    "last checkpoint"
)


class StopIf(Settings):
    """Stops training once dense features, or k-NN, are worse than at the start.

    Training steps are divided into windows. The means over a window of `cls_patch_cosine` (lower is better) and of
    `patch_locality` (higher is better) are compared with those of the first window. With `knn`, each k-NN accuracy is
    compared with the one before the first step, or, once `photos` or `k` of `knn` is changed, with the first one since.
    One amount that is reached is enough. The checkpoints stay: with larger amounts, training continues from the last
    one.
    """

    window: int = Field(100, ge=1, description="The number of steps that the metrics are averaged over.")
    cosine_rise: float | None = Field(
        0.1,
        gt=0,
        description="The rise of the CLS–patch cosine above the first window's value at which training stops. null "
        "ignores the cosine.",
    )
    locality_drop: float | None = Field(
        0.1,
        gt=0,
        description="The drop of the patch locality below the first window's value at which training stops. null "
        "ignores the locality.",
    )
    knn_drop: float | None = Field(
        0.05,
        gt=0,
        le=1,
        description="The drop of the k-NN accuracy below that of the starting weights at which training stops, where "
        "`knn` computes it. null ignores it.",
    )

    def check_probed(self, knn: KnnProbe | None) -> None:
        """Raises ValueError unless something may stop training; `knn` says what is watched besides dense health."""
        if knn is None and self.knn_drop is not None and "knn_drop" in self.model_fields_set:
            raise ValueError("stop_if.knn_drop needs `knn`, which computes the accuracy: set `knn: {}`")
        if self.cosine_rise is None and self.locality_drop is None and (knn is None or self.knn_drop is None):
            more = ", or knn_drop" if knn is not None else ", or `knn`"
            raise ValueError(f"set cosine_rise or locality_drop{more}: without them nothing would stop")


class HealthLimit:
    """Watches dense health and k-NN from the start. All workers see the same metrics, so all stop alike.

    Args:
        limits: None watches nothing.
        state: where all that it knows is kept, between restarts too.
    """

    def __init__(self, limits: StopIf | None, state: MutableMapping[str, float]) -> None:
        self.limits, self.state = limits, state

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the step that took the count to `done`.

        Raises:
            UserError: a limit is reached.
        """
        limits = self.limits
        if limits is None:
            return
        seen = window_mean(self.state, "stop_window", metrics, limits.window)
        if seen is None:
            return
        if not all(name in self.state for name in _FIRST):
            self.state.update(zip(_FIRST, (seen.cosine, seen.locality), strict=True))
            return
        cosine, locality = (self.state[name] for name in _FIRST)
        rise, drop = seen.cosine - cosine, locality - seen.locality
        wrong = []
        if limits.cosine_rise is not None and rise >= limits.cosine_rise:
            wrong.append(f"the CLS–patch cosine rose from {cosine:.3f} to {seen.cosine:.3f}")
        if limits.locality_drop is not None and drop >= limits.locality_drop:
            wrong.append(f"the patch locality fell from {locality:.3f} to {seen.locality:.3f}")
        if wrong:
            raise UserError(
                f"training stopped after step {done}, since dense features are worse than at the start: "
                f"{' and '.join(wrong)} (means over {limits.window} steps)",
                where="stop_if",
                hint=_HINT,
            )

    def update_knn(self, done: int, figure: str, accuracy: float, probe: KnnProbe) -> None:
        """Take the k-NN accuracy after `done` steps. The first one is that of the weights that training starts from.

        Where another number of photos or neighbours is asked for since, the first one says nothing of the next: these
        are compared with the first accuracy that was computed as they are.

        Raises:
            UserError: the limit is reached.
        """
        how = dict(zip(_KNN_HOW, (float(probe.photos), float(probe.k)), strict=True))
        # States of earlier versions do not say how it was computed.
        if any(self.state.get(name, value) != value for name, value in how.items()):
            del self.state[_FIRST_KNN]
        self.state.update(how)
        first = self.state.setdefault(_FIRST_KNN, accuracy)
        limit = self.limits.knn_drop if self.limits is not None else None
        if limit is None or first - accuracy < limit:
            return
        raise UserError(
            f"training stopped after step {done}, since k-NN is worse than at the start: {figure} fell from "
            f"{first:.3f} to {accuracy:.3f}",
            where="stop_if.knn_drop",
            hint=_HINT,
        )


def window_mean(
    state: MutableMapping[str, float], prefix: str, metrics: Mapping[str, float], window: int
) -> Health | None:
    """Add a step's dense health to a window; its means if this step ends it, else None.

    Args:
        state: holds the sums, below names that begin with `prefix`.
        metrics: of the step.
        window: steps.
    """
    sums = (f"{prefix}_cosine", f"{prefix}_locality")
    count = f"{prefix}_steps"
    for name, figure in zip(sums, ("cls_patch_cosine", "patch_locality"), strict=True):
        state[name] = state.get(name, 0.0) + metrics[figure]
    state[count] = state.get(count, 0.0) + 1
    if state[count] < window:
        return None
    cosine, locality = (state.pop(name) / window for name in sums)
    del state[count]
    return Health(cosine=cosine, locality=locality)
