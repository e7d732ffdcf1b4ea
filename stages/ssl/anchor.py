"""When Gram anchoring starts: at once, or when dense features have decayed. The decision is made of metrics alone."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from enum import Enum

from orchestrator.stages.common.lineage import Health
from orchestrator.stages.ssl.gram import DenseHealth
from orchestrator.stages.ssl.stop_if import window_mean

_STARTED = "gram_started"
_BEST = ("gram_best_cosine", "gram_best_locality")


class AnchorDecision(Enum):
    """What a step's metrics mean."""

    GO_ON = "nothing new"
    KEEP = "the EMA is the best so far: keep it as the Gram teacher"
    START = "it has decayed: start anchoring"


class DenseHealthMonitor:
    """Watches dense health until anchoring starts (see `DenseHealth`).

    The metrics that it is shown are the same on all workers, so all decide alike.

    Args:
        trigger: what to wait for; None starts at step 0.
        state: where all that it knows is kept, between restarts too.
        mark: health of the snapshot that the Gram teacher is now: the best of what came before this stage.
    """

    def __init__(
        self, trigger: DenseHealth | None, state: MutableMapping[str, float], mark: Health | None
    ) -> None:
        self.trigger, self.state = trigger, state
        if trigger is not None and mark is not None:
            self._set_best(mark)

    @property
    def started(self) -> int | None:
        """After how many updates of this stage anchoring started; None if it has not."""
        if self.trigger is None:
            return 0
        return int(self.state[_STARTED]) if _STARTED in self.state else None

    def update(self, done: int, metrics: Mapping[str, float]) -> AnchorDecision:
        """Take the metrics of the step that took the count to `done`."""
        if self.trigger is None or _STARTED in self.state:
            return AnchorDecision.GO_ON
        seen = window_mean(self.state, "gram_window", metrics, self.trigger.window)
        if seen is None:
            return AnchorDecision.GO_ON
        best = self._best()
        if best is None or seen.score > best.score:
            self._set_best(seen)
            return AnchorDecision.KEEP
        if not _has_decayed(self.trigger, best, seen):
            return AnchorDecision.GO_ON
        self.state[_STARTED] = float(done)
        return AnchorDecision.START

    def _best(self) -> Health | None:
        cosine, locality = (self.state.get(name) for name in _BEST)
        if cosine is None or locality is None:
            return None
        return Health(cosine=cosine, locality=locality)

    def _set_best(self, health: Health) -> None:
        self.state.update(zip(_BEST, (health.cosine, health.locality), strict=True))


def _has_decayed(trigger: DenseHealth, best: Health, seen: Health) -> bool:
    rose = trigger.cosine_rise is None or seen.cosine - best.cosine >= trigger.cosine_rise
    fell = trigger.locality_drop is None or best.locality - seen.locality >= trigger.locality_drop
    return rose and fell
