"""The training loop: the only one. It reads load → targets → losses → step → report → save.

Every worker runs it. Nothing in it depends on how many workers there are, save which blocks are its own:
worker r of W takes blocks r, r+W, r+2W, …; the ones past the end are padded with block r's first, at weight 0, so that
collectives line up. The loss is the mean over the step's blocks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.data.blocks import Block, BlockSource
from orchestrator.elastic import checkpoint
from orchestrator.elastic.engine import Engine
from orchestrator.elastic.export import export_ema
from orchestrator.elastic.task import BlockTensors, Losses, Task
from orchestrator.errors import UserError
from orchestrator.spec import Elastic, Optimizer

logger = logging.getLogger("orchestrator")


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to train; sent to it by Ray, so all of it pickles.

    Attributes:
        name: in logs and reports, such as `pretrain` or `distill/vit-nano`.
        task: makes the task; called in every worker.
        blocks: makes the data source; called in every worker.
        num_steps: optimiser updates of the whole job.
        optimizer: AdamW and its schedules.
        zero_stage: 1, 2 or 3.
        precision: `auto` is bf16 where a GPU has it, else fp32.
        work: the job's folder; checkpoints and exports live below it.
        seed: of weight initialisation.
        start_from: a committed checkpoint of an earlier stage to begin with, weights and moments.
        gpus_per_worker: where there are GPUs; less than 1 lets jobs share one.
        export_steps: after these many steps the EMA is exported to `exports/step-….safetensors`; the last
            step always is.
        elastic: checkpoint interval and what to keep.
    """

    name: str
    task: Callable[[], Task]
    blocks: Callable[[], BlockSource]
    num_steps: int
    optimizer: Optimizer
    zero_stage: int
    precision: str
    work: Path
    seed: int
    elastic: Elastic
    start_from: Path | None = None
    gpus_per_worker: float = 1.0
    export_steps: tuple[int, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Where this job's elastic checkpoints are."""
        return self.work / "checkpoints"

    def export(self, step: int) -> Path:
        """Where the EMA after `step` updates is exported to."""
        return self.work / "exports" / f"step-{step:08d}.safetensors"


class Control(Protocol):
    """The line to the driver, used by worker 0 only."""

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Hand over the figures of the step that took the count to `step`; returns at once."""

    def flush(self) -> None:
        """Wait until everything reported is written down."""

    def stop_requested(self) -> bool:
        """Whether the driver asked for a clean stop."""


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the update was not applied."""


def train(job: Job, control: Control) -> bool:
    """Train `job` to its end in this worker of an initialised process group.

    Returns:
        True when all steps are done, False after a clean stop on request (checkpointed).

    Raises:
        NonFiniteLossError: before the update that would have spoilt the weights.
    """
    return _Trainer(job, control).run()


class _Trainer:
    def __init__(self, job: Job, control: Control) -> None:
        self.job, self.control = job, control
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = _device()
        torch.manual_seed(job.seed)
        self.task = job.task()
        modules = self.task.build(self.device)
        self.blocks = job.blocks()
        self.num_blocks = self.blocks.num_blocks
        self.slots = -(-self.num_blocks // self.world)
        self.engine = Engine(
            modules,
            job.optimizer,
            zero_stage=job.zero_stage,
            precision=_precision(job.precision, self.device),
            blocks_per_worker=self.slots,
        )
        self.start = self._restore()
        self.saved_step, self.saved_at = self.start, time.monotonic()

    def run(self) -> bool:
        for step, blocks in self._feed():
            began = time.monotonic()
            figures = self._step(step, blocks)
            done = step + 1
            if self.rank == 0:
                figures["step_seconds"] = time.monotonic() - began
                self.control.report(done, figures)
            save, stop = self._agree()
            if done in self.job.export_steps:
                export_ema(self.engine, self.job.export(done), done)
            if save or stop or done == self.job.num_steps:
                self._save(done)
            if stop and done < self.job.num_steps:
                return False
        export_ema(self.engine, self.job.export(self.job.num_steps), self.job.num_steps)
        return True

    def _step(self, step: int, blocks: list[BlockTensors]) -> dict[str, float]:
        self.task.prepare_step(step)
        targets = self.task.targets(blocks, _sum_over_workers)
        slots_per_block = self.slots * self.world / self.num_blocks
        sums: dict[str, Tensor] = {}
        for block, target in zip(blocks, targets, strict=True):
            losses = self.task.losses(block, target)
            self.engine.backward(losses.total * (block.weight * slots_per_block))
            _accumulate(sums, losses, block.weight / self.num_blocks)
        names = sorted(sums)
        values = _sum_over_workers(torch.stack([sums[name] for name in names])).tolist()
        figures = dict(zip(names, values, strict=True))
        if not all(map(_finite, values)):
            bad = ", ".join(name for name in names if not _finite(figures[name]))
            raise NonFiniteLossError(
                f"{self.job.name}: {bad} not finite at step {step}; the update was not applied"
            )
        lr = self.job.optimizer.lr.at(step, self.job.num_steps)
        figures["grad_norm"] = self.engine.step(lr, step)
        figures["lr"] = lr
        self.task.after_step(step, self.engine)
        return figures

    def _feed(self) -> Iterator[tuple[int, list[BlockTensors]]]:
        """Each step's own blocks on the device, the next step's loaded behind the current one's back."""
        with ThreadPoolExecutor(1, thread_name_prefix="blocks") as pool:
            ahead: Future[list[Block]] | None = None
            for step in range(self.start, self.job.num_steps):
                loaded = (ahead or pool.submit(self._load, step)).result()
                ahead = pool.submit(self._load, step + 1) if step + 1 < self.job.num_steps else None
                yield step, [_to_device(block, self.device) for block in loaded]

    def _load(self, step: int) -> list[Block]:
        blocks = [self.blocks.load(step, index) for index in range(self.rank, self.num_blocks, self.world)]
        while len(blocks) < self.slots:
            filler = blocks[0] if blocks else self.blocks.load(step, 0)
            blocks.append(replace(filler, weight=0.0))
        return blocks

    def _agree(self) -> tuple[bool, bool]:
        """Whether all workers save now, and whether they stop: worker 0 decides, so nobody hangs."""
        decision = torch.zeros(2, device=self.device)
        if self.rank == 0:
            due = time.monotonic() - self.saved_at >= self.job.elastic.checkpoint_every_s
            decision = torch.tensor([float(due), float(self.control.stop_requested())], device=self.device)
        dist.broadcast(decision, 0)
        save, stop = (bool(value) for value in decision.tolist())
        return save, stop

    def _save(self, done: int) -> None:
        if self.rank == 0:
            # The curve must reach at least as far as the checkpoint, or a crash would leave a gap in it.
            self.control.flush()
        meta = {"job": self.job.name, "num_steps": self.job.num_steps, "seed": self.job.seed}
        checkpoint.save(
            self.job.checkpoints, self.engine, done, meta=meta, keep=self.job.elastic.keep_checkpoints
        )
        self.saved_step, self.saved_at = done, time.monotonic()

    def _restore(self) -> int:
        saved = checkpoint.latest(self.job.checkpoints)
        if saved is not None:
            return checkpoint.restore(saved, self.engine)
        if self.job.start_from is not None:
            # An earlier stage's weights and moments; the count of this stage's steps starts anew.
            try:
                checkpoint.restore(checkpoint.verified(self.job.start_from), self.engine)
            except ValueError as error:
                raise UserError(
                    f"the checkpoint to start from cannot be used: {error}", where=str(self.job.start_from)
                ) from None
        return 0


def _device() -> str:
    if torch.cuda.is_available():
        import ray.train.torch

        return str(ray.train.torch.get_device())
    return "cpu"


def _precision(wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    return "bf16" if device != "cpu" and torch.cuda.is_bf16_supported() else "fp32"


def _to_device(block: Block, device: str) -> BlockTensors:
    tensors = {
        name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in block.arrays.items()
    }
    return BlockTensors(block.step, block.index, block.weight, tensors)


def _accumulate(sums: dict[str, Tensor], losses: Losses, weight: float) -> None:
    for name, value in {"loss": losses.total, **losses.figures}.items():
        term = value.detach().float() * weight
        sums[name] = sums[name] + term if name in sums else term


def _sum_over_workers(tensor: Tensor) -> Tensor:
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _finite(value: float) -> bool:
    return value - value == 0.0
