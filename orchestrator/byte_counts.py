"""How many bytes of checkpoints and artifacts a stage reads and writes: in its driver, and in its workers.

The storage layer counts where it reads and writes; each worker tells the driver what it counted, every second and when
it ends; the driver records the figures of a stage once, as the metrics `io/…` of its run. Links count nothing.

`checkpoint` is what training leaves: elastic checkpoints, and exports of the EMA and what is made of them. `artifact`
is what lies below `artifacts/` of the store: what is compared with a manifest, fetched, and published.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Literal

What = Literal["checkpoint", "artifact"]

NAMES = tuple(f"{what}_bytes_{way}" for what in ("checkpoint", "artifact") for way in ("read", "written"))


class ByteCounts:
    """What one process has counted so far, and what workers told it. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self._workers: Counter[str] = Counter()

    def read(self, what: What, count: int) -> None:
        """Count bytes that this process has read."""
        with self._lock:
            self._own[f"{what}_bytes_read"] += count

    def written(self, what: What, count: int) -> None:
        """Count bytes that this process has written."""
        with self._lock:
            self._own[f"{what}_bytes_written"] += count

    def take(self) -> dict[str, int]:
        """What this process has counted since the last call, by name; empty if nothing."""
        with self._lock:
            new = self._own - self._taken
            self._taken = self._own.copy()
        return dict(new)

    def add_workers(self, counted: Mapping[str, int]) -> None:
        """Add what a worker has taken."""
        with self._lock:
            self._workers.update({name: int(counted.get(name, 0)) for name in NAMES})

    def metrics(self) -> dict[str, int]:
        """All so far: `driver_checkpoint_bytes_read`, `worker_artifact_bytes_written` and so on.

        `driver` is this process, `worker` the sum over all workers.
        """
        with self._lock:
            return {
                f"{where}_{name}": counts[name]
                for where, counts in (("driver", self._own), ("worker", self._workers))
                for name in NAMES
            }


BYTES = ByteCounts()
