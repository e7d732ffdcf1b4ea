"""The training loop: the only one. It reads load → targets → losses → step → report → save.

Every worker runs it. Nothing in it depends on how many workers there are, save which blocks are its own:
worker r of W takes blocks r, r+W, r+2W, …; the ones past the end are padded with block r's first, at weight 0, so that
collectives line up. The loss is the mean over the step's blocks.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.data.blocks import Block, TellsTroubles
from orchestrator.elastic import checkpoint
from orchestrator.elastic.device import device
from orchestrator.elastic.engine import Engine
from orchestrator.elastic.export import export_ema
from orchestrator.elastic.failure_rules import PRIOR_MTBF_S
from orchestrator.elastic.job import Job
from orchestrator.elastic.saved import CheckpointError
from orchestrator.elastic.saving import Line, Saving
from orchestrator.elastic.task import BlockTensors, Losses
from orchestrator.elastic.workers import AllWorkers
from orchestrator.errors import UserError

logger = logging.getLogger("orchestrator")

_ORDER_RANGE = 2.0**32


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the update was not applied."""


def train(job: Job, line: Line, mtbf_s: float = PRIOR_MTBF_S) -> bool:
    """Train `job` in this worker of an initialised process group, from its newest good checkpoint to its end.

    Args:
        job: what to train.
        line: to the controller.
        mtbf_s: mean time between losses of a group, from which the time between checkpoints follows if the job
            does not set it.

    Returns:
        True when all steps are done, False after yielding on request; both with a checkpoint.

    Raises:
        NonFiniteLossError: before the update that would have spoilt the weights.
        CheckpointError: no checkpoint could be written several times in a row, or at the end.
    """
    return _Trainer(job, line, mtbf_s).run()


class _Trainer:
    def __init__(self, job: Job, line: Line, mtbf_s: float) -> None:
        self.job, self.line = job, line
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device()
        self.workers = AllWorkers(job.elastic.exact)
        torch.manual_seed(job.seed)
        self.task = job.task()
        modules = self.task.build(self.device)
        assert job.blocks is not None, "a source that lives in the slot is put in its place by the worker"
        self.blocks = job.blocks()
        self.num_blocks = job.num_blocks
        self.slots = -(-self.num_blocks // self.world)
        self.engine = Engine(
            modules,
            job.optimizer,
            zero_stage=job.zero_stage,
            precision=_precision(job.precision, self.device),
            num_blocks=self.num_blocks,
            exact=job.elastic.exact,
        )
        line.phase("built")
        self.start = self._restore()
        line.phase("restored")
        self.saving = Saving(job, self.engine, line, mtbf_s, self.device, self.start)

    def run(self) -> bool:
        for step, blocks in self._feed():
            began = time.monotonic()
            figures = self._step(step, blocks)
            done = step + 1
            if self.rank == 0:
                figures["step_seconds"] = time.monotonic() - began
                figures["data_wait_seconds"] = self.waited_s
            stalled = self.saving.stall_s
            agreed = self.saving.agree()
            last = done == self.job.num_steps
            if agreed.written or agreed.failed:
                self.saving.conclude(agreed)
            if agreed.save and not (agreed.stop or last):
                self.saving.begin(done)
            if self.rank == 0:
                self.line.report(done, figures, self.saving.stall_s - stalled)
                self.saving.tell()
            if done in self.job.export_steps:
                self._export(done)
            if agreed.stop and not last:
                self.saving.now(done)
                return False
        if self.start < self.job.num_steps:
            self.saving.now(self.job.num_steps)
        self._export(self.job.num_steps)
        return True

    def _step(self, step: int, blocks: list[BlockTensors]) -> dict[str, float]:
        self.task.prepare_step(step)
        targets = self.task.targets(blocks, self.workers)
        sums: dict[str, Tensor] = {}
        for block, target in zip(blocks, targets, strict=True):
            losses = self.task.losses(block, target)
            self.engine.backward(losses.total * block.weight)
            _accumulate(sums, losses, block.weight / self.num_blocks)
        figures = self._sum_figures(sums, *self.seen.pop(step))
        if bad := [name for name, value in figures.items() if not _finite(value)]:
            raise NonFiniteLossError(
                f"{self.job.name}: {', '.join(bad)} not finite at step {step}; the update was not applied"
            )
        optimizer, num_steps = self.job.optimizer, self.job.num_steps
        lr, weight_decay = optimizer.lr.at(step, num_steps), optimizer.weight_decay.at(step, num_steps)
        figures |= self.engine.step(lr, step, weight_decay)
        figures |= {"lr": lr, "weight_decay": weight_decay}
        self.task.after_step(step, self.engine, figures)
        return figures

    def _sum_figures(self, sums: dict[str, Tensor], order: int, num_replaced: int) -> dict[str, float]:
        """Figures over all workers, and which samples the step saw: a hash that no worker count changes."""
        names = sorted(sums)
        own = torch.tensor([order, num_replaced], dtype=torch.float64, device=self.device)
        packed = torch.cat([torch.stack([sums[name] for name in names]), own])
        *values, total, replaced = self.workers(packed).tolist()
        figures = {**dict(zip(names, values, strict=True)), "sample_order": total % _ORDER_RANGE}
        return {**figures, "replaced_photos": replaced} if replaced else figures

    def _feed(self) -> Iterator[tuple[int, list[BlockTensors]]]:
        """Each step's own blocks on the device, the next step's loaded behind the current one's back."""
        self.seen: dict[int, tuple[int, int]] = {}
        self.waited_s = 0.0
        with ThreadPoolExecutor(1, thread_name_prefix="blocks") as pool:
            ahead: Future[list[Block]] | None = None
            for step in range(self.start, self.job.num_steps):
                asked = time.monotonic()
                loaded = (ahead or pool.submit(self._load, step)).result()
                self.waited_s = time.monotonic() - asked
                ahead = pool.submit(self._load, step + 1) if step + 1 < self.job.num_steps else None
                if isinstance(self.blocks, TellsTroubles):
                    for what in self.blocks.take_troubles():
                        self.line.trouble(what)
                own = [block for block in loaded if block.weight > 0]
                self.seen[step] = sum(map(_order, own)), sum(block.num_replaced for block in own)
                yield step, [_to_device(block, self.device) for block in loaded]

    def _load(self, step: int) -> list[Block]:
        blocks = [self.blocks.load(step, index) for index in range(self.rank, self.num_blocks, self.world)]
        while len(blocks) < self.slots:
            filler = blocks[0] if blocks else self.blocks.load(step, 0)
            blocks.append(replace(filler, weight=0.0))
        return blocks

    # --- start and end ------------------------------------------------------------------------------------------

    def _export(self, done: int) -> None:
        export_ema(self.engine, self.job.export(done), done)
        if self.rank == 0 and self.job.remote is not None:
            store, prefix = self.job.remote
            store.put_file(f"{prefix}exports/{self.job.export(done).name}", self.job.export(done))

    def _restore(self) -> int:
        saved = checkpoint.newest(self.job.target, self.rank, self.world, self._all, self.device)
        if saved is not None:
            self.engine.modules.state.clear()
            self.engine.modules.state.update(saved.state)
            return checkpoint.restore(saved, self.engine)
        if self.job.start_from is not None:
            # An earlier stage's weights and moments; the count of this stage's steps starts anew.
            try:
                checkpoint.restore(checkpoint.verified(self.job.start_from), self.engine)
            except CheckpointError as error:
                raise UserError(
                    f"the checkpoint to start from cannot be used: {error}", where=str(self.job.start_from)
                ) from None
        return 0

    def _all(self, flag: bool) -> bool:
        return float(self.workers(torch.tensor(float(flag), device=self.device))) == self.world


def _order(block: Block) -> int:
    """A hash of which samples a block holds, in which order; sums of a million of them are exact in float64."""
    text = f"{block.step}/{block.index}:".encode() + np.ascontiguousarray(block.ids, np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


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
        term = value.detach().double() * weight
        sums[name] = sums[name] + term if name in sums else term


def _finite(value: float) -> bool:
    return value - value == 0.0
