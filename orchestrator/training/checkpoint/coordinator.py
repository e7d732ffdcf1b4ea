"""When a job saves, and when a checkpoint counts: what all workers agree on after every step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from orchestrator.training.callback import TrainerCallback
from orchestrator.training.checkpoint import reader
from orchestrator.training.checkpoint.format import CheckpointError
from orchestrator.training.checkpoint.interval import checkpoint_interval
from orchestrator.training.checkpoint.writer import CheckpointWriter
from orchestrator.training.engine import Engine
from orchestrator.training.job import Job

_FAILED, _WRITING, _WRITTEN, _IDLE = -1.0, 0.0, 1.0, 2.0
_MAX_FAILED_SAVES = 3
_POLL_S = 0.01
# A copy that takes no time at all would ask for a checkpoint every step; writing one has its cost, too.
_LEAST_COST_S = 0.05


@dataclass(frozen=True)
class Agreement:
    """What all workers do after a step; the same on each of them."""

    save: bool
    stop: bool
    written: bool
    failed: bool


class CheckpointCoordinator:
    """One worker's part in saving a job's checkpoints; all methods but `tell` are collective.

    Args:
        job: what is trained.
        engine: whose state is saved.
        callback: to the controller.
        mtbf_s: mean time between losses of a group, for the interval if the job sets none.
        device: of the tensors that workers exchange.
        step: steps done so far.
    """

    def __init__(
        self, job: Job, engine: Engine, callback: TrainerCallback, mtbf_s: float, device: str, step: int
    ) -> None:
        self._job, self._engine, self._device = job, engine, device
        self._callback, self._mtbf_s = callback, mtbf_s
        self._rank = dist.get_rank()
        self._writer = CheckpointWriter(
            job.checkpoint_storage,
            token=reader.share(_take_over(job) if self._rank == 0 else None, device),
            keep=job.elastic.keep_checkpoints,
            keep_every=job.elastic.keep_every,
            meta={"job": job.name, "num_steps": job.num_steps, "seed": job.seed},
        )
        self._writer.prepare(engine)
        self._began_at = time.monotonic()
        self._reported = step
        self._failures = 0

    @property
    def stall_s(self) -> float:
        """Seconds that saving has held this worker up, all in all."""
        return self._writer.stall_s

    def agree(self) -> Agreement:
        """What to do now, in one small collective: worker 0 says when to save and to stop, each whether it wrote."""
        due = stop = recorded = True
        if self._rank == 0:
            due = time.monotonic() - self._began_at >= self._interval_s() and self._writer.pending is None
            stop = self._callback.stop_requested()
            recorded = self._writer.pending is None or self._callback.recorded(self._writer.pending)
        own = [float(due), float(stop), float(recorded), self._progress()]
        flags = torch.tensor(own, device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        save, stopping, known, progress = flags.tolist()
        # The curve must reach at least as far as the checkpoint, or a crash would leave a gap in it.
        return Agreement(
            bool(save), bool(stopping), bool(known) and progress == _WRITTEN, progress == _FAILED
        )

    def _progress(self) -> float:
        """How far this worker is with writing its part of the pending checkpoint."""
        if self._writer.pending is None:
            return _IDLE
        try:
            return _WRITTEN if self._writer.written() else _WRITING
        except CheckpointError as error:
            self._callback.trouble(str(error))
            return _FAILED

    def begin(self, done: int) -> None:
        """Copy the state after `done` updates, and write it behind the next steps' back."""
        self._writer.begin(self._engine, done)
        self._began_at = time.monotonic()

    def conclude(self, agreed: Agreement) -> None:
        """Commit the pending checkpoint, or give it up and try again later.

        Raises:
            CheckpointError: it failed several times in a row.
        """
        if agreed.written:
            self._failures = 0
            self._writer.commit()
            return
        self._failures += 1
        step = self._writer.pending
        if self._failures >= _MAX_FAILED_SAVES:
            self._writer.wait()  # raises what this worker met
            raise CheckpointError(f"checkpoint {step}: another worker could not write its part")
        self._writer.drop()

    def now(self, done: int) -> None:
        """Write the checkpoint after `done` updates and wait until it is committed."""
        # What is on its way is worth finishing: a machine that goes during this must not lose more than it had to.
        if self._writer.pending is not None:
            self._finish_pending()
        self._writer.begin(self._engine, done)
        self._writer.wait()
        while self._rank == 0 and not self._callback.recorded(done):
            time.sleep(_POLL_S)
        dist.barrier()
        self._writer.commit()
        self._writer.finish()
        if self._rank == 0:
            self.report_committed()
        dist.barrier()

    def _finish_pending(self) -> None:
        step, written = self._writer.pending, True
        assert step is not None
        try:
            self._writer.wait()
        except CheckpointError as error:
            self._callback.trouble(str(error))
            written = False
        while self._rank == 0 and not self._callback.recorded(step):
            time.sleep(_POLL_S)
        flag = torch.tensor([float(written)], device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        if flag.item():
            self._writer.commit()
        else:
            self._writer.drop()

    def report_committed(self) -> None:
        """Tell the controller of a checkpoint that was committed since (worker 0)."""
        step = self._writer.committed
        if step is not None and step > self._reported:
            self._reported = step
            metrics = {
                "stall_seconds": self._writer.last_stall_s,
                "write_seconds": self._writer.last_write_s,
                "bytes": float(self._writer.last_bytes),
                "interval_seconds": self._interval_s(),
            }
            self._callback.saved(step, metrics)

    def _interval_s(self) -> float:
        wanted = self._job.elastic.checkpoint_every_s
        return wanted or checkpoint_interval(max(self._writer.last_stall_s, _LEAST_COST_S), self._mtbf_s)


def _take_over(job: Job) -> str:
    try:
        return job.checkpoint_storage.acquire()
    except OSError as error:
        raise CheckpointError(f"{job.checkpoints} cannot be written: {error.strerror or error}") from error
