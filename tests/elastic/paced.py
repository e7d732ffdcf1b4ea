"""The tiny job at a pace that a test sets: slow while it needs to be, then as fast as it can. Found by PYTHONPATH."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from tiny import TinyTask, tiny_job

from orchestrator.training.job import Job

SLOW_S = 0.3


class PacedTask(TinyTask):
    """A step takes `SLOW_S` as long as there is a file `slow` in `faults`."""

    def prepare_step(self, step: int) -> None:
        super().prepare_step(step)
        if (self.faults / "slow").exists():
            time.sleep(SLOW_S)


def paced_job(work: Path, steps: int, *, num_blocks: int) -> Job:
    job = tiny_job(work, steps, (1, num_blocks), num_blocks=num_blocks, checkpoint_every_s=0.5)
    return replace(job, task=partial(PacedTask, work.with_name(work.name + "-faults"), 0.0))
