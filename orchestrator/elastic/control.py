"""The line between a job's workers and the driver: figures one way, a request to stop the other.

Imports nothing heavy: the actor is a process of its own and should be there at once.
"""

from __future__ import annotations

from typing import Any

from orchestrator.tracking.runs import Run


class Control:
    """Lives beside the driver: writes what workers report into the run's spool, and passes on a stop."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stop = False
        self._last: tuple[int, dict[str, float]] | None = None
        self._outcome: bool | None = None

    def report(self, step: int, figures: dict[str, float]) -> bool:
        """Record a step's figures (a replayed step is recorded once); answers whether to stop."""
        self._run.metrics(figures, step)
        self._last = (step, figures)
        return self._stop

    def stop(self) -> None:
        """Ask the job to checkpoint and end."""
        self._stop = True

    def progress(self) -> tuple[int, dict[str, float]] | None:
        """The newest report."""
        return self._last

    def finished(self, complete: bool) -> None:
        """Worker 0 tells how the job ended."""
        self._outcome = complete

    def outcome(self) -> bool | None:
        """True: all steps done; False: stopped on request; None: neither was reported."""
        return self._outcome


class WorkerControl:
    """Worker 0's end of the line. Reports never wait; their answers are picked up when they are there."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._pending: list[Any] = []
        self._stop = False

    def report(self, step: int, figures: dict[str, float]) -> None:
        self._pending.append(self._actor.report.remote(step, figures))

    def flush(self) -> None:
        import ray

        self._take(ray.get(self._pending))
        self._pending = []

    def stop_requested(self) -> bool:
        import ray

        if self._pending:
            ready, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
            self._take(ray.get(ready))
        return self._stop

    def _take(self, answers: list[bool]) -> None:
        self._stop = self._stop or any(answers)
