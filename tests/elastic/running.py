"""A job under the real controller, in a thread of the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from orchestrator.elastic import trainer
from orchestrator.elastic.time_accounting import TimeAccounting
from orchestrator.tracking.run import NullRun
from orchestrator.training.job import Job

PATIENCE_S = 90.0


class TaggedRun(NullRun):
    """Keeps the tags, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tagged: dict[str, Any] = {}

    def tags(self, values: Mapping[str, Any]) -> None:
        self.tagged |= values


class Running:
    """A job in a thread, and what one can ask about it."""

    all: ClassVar[list[Running]] = []

    def __init__(self, job: Job) -> None:
        self.all.append(self)
        self.job, self.run, self.stop = job, TaggedRun(), threading.Event()
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._go, daemon=True)
        self.thread.start()

    def _go(self) -> None:
        try:
            trainer.run(self.job, tracker=self.run, stop=self.stop, on_line=self.lines.append)
        except BaseException as error:
            self.error = error

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.lines
            assert self.thread.is_alive() or condition(), (self.lines, self.error)
            self.thread.join(0.05)  # or until it ends

    def step(self) -> int:
        return max((int(record["step"]) for record in self.run.history()), default=0)

    def workers(self) -> int:
        newest = max(self.run.history("goodput"), key=lambda record: record["step"], default=None)
        return int(newest["metrics"]["workers"]) if newest else 0

    def finish(self) -> TimeAccounting:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), self.lines
        if self.error is not None:
            raise self.error
        return TimeAccounting.load(self.job.work / "goodput.json")

    def weights(self) -> dict[str, np.ndarray]:
        """Of its last export."""
        self.finish()
        return load_file(self.job.export(self.job.num_steps))


def assert_same(running: Running, reference: Running) -> None:
    """Each step's samples are the same, losses agree to 1e-4, final weights to 1e-3 in relative norm."""
    got = {r["step"]: r["metrics"] for r in running.run.history()}
    wanted = {r["step"]: r["metrics"] for r in reference.run.history()}
    assert got.keys() == wanted.keys()
    for step, metrics in wanted.items():
        assert got[step]["sample_order"] == metrics["sample_order"], step
        assert got[step]["loss"] == pytest.approx(metrics["loss"], rel=1e-4), step
    ours, theirs = (load_file(r.job.export(r.job.num_steps)) for r in (running, reference))
    for name, value in theirs.items():
        assert np.linalg.norm(ours[name] - value) <= 1e-3 * np.linalg.norm(value), name
