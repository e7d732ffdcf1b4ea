"""The training loop: the only one. It reads load → targets → losses → step → report → save.

Every worker runs it. Nothing in it depends on how many workers there are, save which blocks are its own:
worker r of W takes blocks r, r+W, r+2W, …; the ones past the end are padded with block r's first, at weight 0, so that
collectives line up. The loss is the mean over the step's blocks.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.blocks import Block, BlockSource, ReportsTroubles
from orchestrator.errors import UserError
from orchestrator.training.callback import TrainerCallback
from orchestrator.training.checkpoint import reader
from orchestrator.training.checkpoint.coordinator import CheckpointCoordinator
from orchestrator.training.checkpoint.format import CheckpointError
from orchestrator.training.checkpoint.format import read as read_manifest
from orchestrator.training.checkpoint.interval import PRIOR_MTBF_S
from orchestrator.training.collectives import AllWorkers
from orchestrator.training.device import CPU, device, use_deterministic_kernels
from orchestrator.training.device_copies import DeviceCopies, SentBlock
from orchestrator.training.engine import build_engine
from orchestrator.training.export import export_ema
from orchestrator.training.job import Job
from orchestrator.training.loader import BlockLoader
from orchestrator.training.loader_process import ProcessBlocks
from orchestrator.training.out_of_memory import out_of_memory_explained
from orchestrator.training.skipped_updates import STEPS_PER_SKIP, named
from orchestrator.training.task import BlockTensors, Losses, Probing

_ORDER_RANGE = 2.0**32
# Unreadable photos that a message names.
_NAMED = 5
_Ids = Mapping[int, NDArray[np.int64]]  # of a worker's own blocks, by block


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the update was not applied."""


def train(job: Job, callback: TrainerCallback, mtbf_s: float = PRIOR_MTBF_S) -> bool:
    """Train `job` in this worker of an initialised process group, from its newest good checkpoint to its end.

    Args:
        job: what to train.
        line: to the controller.
        mtbf_s: mean time between losses of a group, from which the time between checkpoints follows if the job
            does not set it.

    Returns:
        True when all steps are done, False after yielding on request; both with a checkpoint.

    Raises:
        NonFiniteLossError: before the update that would have spoilt the weights; names the samples.
        UserError: too many updates were skipped since a gradient was not finite, or memory did not suffice.
        CheckpointError: no checkpoint could be written several times in a row, or at the end.
    """
    with out_of_memory_explained(job, "while the model was built"):
        trainer = _Trainer(job, callback, mtbf_s)
    return trainer.run()


class _Trainer:
    def __init__(self, job: Job, callback: TrainerCallback, mtbf_s: float) -> None:
        self.job, self.callback = job, callback
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device()
        if job.elastic.exact and self.device != CPU:
            use_deterministic_kernels()
        self.workers = AllWorkers(job.elastic.exact)
        torch.manual_seed(job.seed)
        self.task = job.task()
        modules = self.task.build(self.device)
        assert job.blocks is not None, "a source that lives in the slot is put in its place by the worker"
        self.blocks = job.blocks()
        self.held_out = job.validation() if job.validation is not None else None
        self.probed: list[Block] | None = None
        self.num_blocks = job.num_blocks
        self.engine = build_engine(
            modules,
            job.optimizer,
            zero_stage=job.zero_stage,
            precision=_precision(job.precision, self.device),
            num_blocks=self.num_blocks,
            exact=job.elastic.exact,
        )
        callback.phase("built")
        self.start = self._restore()
        callback.phase("restored")
        self.checkpointing = CheckpointCoordinator(
            job, self.engine, callback, mtbf_s, self.device, self.start
        )

    def run(self) -> bool:
        if self.start == 0 and (before := self._held_out(0)) and self.rank == 0:
            self.callback.looked(0, before)
        for step, blocks in self._feed():
            began = time.monotonic()
            with out_of_memory_explained(self.job, f"in step {step + 1}", blocks):
                metrics = self._step(step, blocks)
            done = step + 1
            if self.rank == 0:
                metrics["step_seconds"] = time.monotonic() - began
                metrics["data_wait_seconds"] = self.waited_s
            held_out = self._held_out(done)
            stalled = self.checkpointing.stall_s
            agreed = self.checkpointing.agree()
            last = done == self.job.num_steps
            if agreed.written or agreed.failed:
                self.checkpointing.conclude(agreed)
            if agreed.save and not (agreed.stop or last):
                self.checkpointing.begin(done)
            if self.rank == 0:
                self.callback.report(done, metrics, self.checkpointing.stall_s - stalled, held_out)
                self.checkpointing.report_committed()
            if done in self.job.export_steps:
                self._export(done)
            if agreed.stop and not last:
                self.checkpointing.now(done)
                return False
        if self.start < self.job.num_steps:
            self.checkpointing.now(self.job.num_steps)
        self._export(self.job.num_steps)
        return True

    def _step(self, step: int, blocks: list[BlockTensors]) -> dict[str, float]:
        self.task.prepare_step(step)
        targets = self.task.targets(blocks, self.workers)
        sums: dict[str, Tensor] = {}
        own: dict[int, dict[str, Tensor]] = {}
        for block, target in zip(blocks, targets, strict=True):
            losses = self.task.losses(block, target)
            self.engine.backward(losses.total * block.weight)
            own[block.index] = _accumulate(sums, losses, block.weight / self.num_blocks)
        order, num_replaced, ids, unreadable = self.seen.pop(step)
        metrics = self._sum_metrics(sums, order, num_replaced)
        if "replaced_photos" in metrics:
            self._note_unreadable(unreadable)
        if bad := [name for name, value in metrics.items() if not _finite(value)]:
            guilty = [i for i in ids if not all(own[i][name].isfinite() for name in bad if name in own[i])]
            raise NonFiniteLossError(
                f"{self.job.name}: {', '.join(bad)} not finite at step {step + 1}, in "
                f"{named(self._ids(guilty, ids))}; the update was not applied"
            )
        optimizer, num_steps = self.job.optimizer, self.job.num_steps
        lr, weight_decay = optimizer.lr.at(step, num_steps), optimizer.weight_decay.at(step, num_steps)
        metrics |= self.engine.step(lr, step, weight_decay)
        metrics |= {"lr": lr, "weight_decay": weight_decay}
        if self.engine.applied:
            self.task.after_step(step, self.engine, metrics)
        else:
            bad = [name for name, value in metrics.items() if not _finite(value)]
            self._skipped(step, bad, self._guilty(blocks, targets, ids))
            metrics = {name: value for name, value in metrics.items() if name not in bad}
        if self.engine.skips.total:
            metrics["skipped_updates"] = float(self.engine.skips.total)
        return metrics

    # --- held-out photos ----------------------------------------------------------------------------------------

    def _held_out(self, done: int) -> dict[str, float]:
        """Metrics of photos that are not trained on, if it is their turn after so many steps; collective."""
        found: list[dict[str, float]] = []
        with out_of_memory_explained(self.job, f"with held-out photos after step {done}"):
            if self.held_out is not None and done and self._is_due(done, self.job.validate_every):
                found.append(self._validated())
            if self.job.probe is not None and self._is_due(done, self.job.probe_every):
                found.append(self._probed(done))
        if not found:
            return {}
        seconds = sum(metrics["seconds"] for metrics in found)
        return {name: value for metrics in found for name, value in metrics.items()} | {"seconds": seconds}

    def _is_due(self, done: int, every: int) -> bool:
        return every > 0 and (done % every == 0 or done == self.job.num_steps)

    def _probed(self, done: int) -> dict[str, float]:
        """What the task finds of its weights, and its `seconds`; collective."""
        assert self.job.probe is not None
        assert isinstance(self.task, Probing), f"{self.job.name} has nothing to look with"
        began = time.monotonic()
        if self.probed is None:
            source = self.job.probe()
            self.probed = self._load(0, source)
            self._report_troubles(source)
        blocks = self._moved(self.probed)
        return {**self.task.probe(done, blocks, self.workers), "seconds": time.monotonic() - began}

    def _validated(self) -> dict[str, float]:
        """Metrics of the held-out blocks, with the weights as they are now, and its own `seconds`; collective.

        They are the blocks of step 0 of their own source each time, shared out as a step's blocks are.
        """
        assert self.held_out is not None
        began = time.monotonic()
        num_blocks = self.held_out.num_blocks
        loaded = self._load(0, self.held_out)
        self._report_troubles(self.held_out)
        own = [block for block in loaded if block.weight > 0]
        blocks = self._moved(loaded)
        sums: dict[str, Tensor] = {}
        with torch.no_grad(), self.engine.evaluating():
            targets = self.task.targets(blocks, self.workers)
            for block, target in zip(blocks, targets, strict=True):
                _accumulate(sums, self.task.losses(block, target), block.weight / num_blocks)
        metrics = self._sum_metrics(sums, 0, sum(block.num_replaced for block in own))
        del metrics["sample_order"]  # the same each time
        if "replaced_photos" in metrics:
            self._note_unreadable(_unreadable(own))
        # As with norms: what is not finite is a gap in its curve.
        metrics = {name: value for name, value in metrics.items() if _finite(value)}
        return {**metrics, "seconds": time.monotonic() - began}

    # --- what is not finite -------------------------------------------------------------------------------------

    def _guilty(self, blocks: list[BlockTensors], targets: list[Any], ids: _Ids) -> dict[int, list[int]]:
        """Which blocks of all workers have gradients that are not finite, and their samples; collective.

        Only the sum of all gradients is at hand, so they are computed once more, and looked at block by block.
        """
        found = []
        for block, target in zip(blocks, targets, strict=True):
            loss = self.task.losses(block, target).total * block.weight
            if not self.engine.backward_is_finite(loss) and block.index in ids:
                found.append(block.index)
        self.engine.discard()
        return self._ids(found, ids)

    def _skipped(self, step: int, bad: list[str], guilty: dict[int, list[int]]) -> None:
        """Write down that the update of `step` was skipped.

        Raises:
            UserError: too many were.
        """
        what, limit = named(guilty), self.job.elastic.max_skipped_updates
        too_many = self.engine.skips.add(step + 1, what, limit)
        if self.rank == 0:
            norms = ", ".join(bad) or "grad_norm"
            self.callback.trouble(
                f"step {step + 1}: the update was skipped, because {norms} is not finite: {what}"
            )
        if too_many:
            within = f"within {limit * STEPS_PER_SKIP:,} steps" if limit else "in all"
            raise UserError(
                f"{self.job.name}: {len(self.engine.skips.recent)} updates were skipped {within}, because gradients "
                f"were not finite, and max_skipped_updates is {limit}\n  {self.engine.skips.listed()}",
                where=self.job.where,
                hint="look at these samples (rows of the photos' index), lower `optimizer.lr.peak`, or raise "
                "`elastic.max_skipped_updates` and continue from the latest checkpoint",
            )

    def _ids(self, indices: list[int], ids: _Ids) -> dict[int, list[int]]:
        """The samples of those blocks that any worker names, on all workers; collective.

        If none is named, of all blocks: each one's metrics are finite then, and only their sum is not.
        """
        lengths = torch.zeros(self.num_blocks, dtype=torch.int64, device=self.device)
        for index in indices:
            lengths[index] = len(ids[index])
        counts = self.workers(lengths).tolist()
        if not any(counts):
            return self._ids(list(ids), ids)
        starts = [sum(counts[:index]) for index in range(self.num_blocks)]
        rows = torch.zeros(sum(counts), dtype=torch.int64, device=self.device)
        for index in indices:
            rows[starts[index] : starts[index] + counts[index]] = torch.as_tensor(ids[index])
        listed = self.workers(rows).tolist()
        return {i: listed[starts[i] : starts[i] + counts[i]] for i in range(self.num_blocks) if counts[i]}

    def _sum_metrics(self, sums: dict[str, Tensor], order: int, num_replaced: int) -> dict[str, float]:
        """Figures over all workers, and which samples the step saw: a hash that no worker count changes."""
        names = sorted(sums)
        own = torch.tensor([order, num_replaced], dtype=torch.float64, device=self.device)
        packed = torch.cat([torch.stack([sums[name] for name in names]), own])
        *values, total, replaced = self.workers(packed).tolist()
        metrics = {**dict(zip(names, values, strict=True)), "sample_order": total % _ORDER_RANGE}
        return {**metrics, "replaced_photos": replaced} if replaced else metrics

    def _note_unreadable(self, rows: list[int]) -> None:
        """Count the photos that any worker could not read in a step; collective.

        Args:
            rows: those that this worker could not read.

        Raises:
            UserError: with those of earlier steps they are more than the stage may find.
        """
        lengths = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        lengths[self.rank] = len(rows)
        counts = self.workers(lengths).tolist()
        found = torch.zeros(sum(counts), dtype=torch.int64, device=self.device)
        start = sum(counts[: self.rank])
        found[start : start + len(rows)] = torch.as_tensor(rows, dtype=torch.int64)
        self.engine.unreadable |= set(self.workers(found).tolist())
        every, limit = sorted(self.engine.unreadable), self.job.max_unreadable
        if limit is None or len(every) <= limit:
            return
        shown = every[:_NAMED]
        # Where another process reads, its log has the names.
        names = [f"row {row} of the photos' index" for row in shown]
        if isinstance(self.blocks, ReportsTroubles):
            names = self.blocks.paths(shown)
        more = f"; and {len(every) - len(shown)} more" if len(every) > len(shown) else ""
        raise UserError(
            f"{self.job.name}: {len(every)} photos could not be read since the stage began, and max_unreadable allows "
            f"{limit}: {'; '.join(names)}{more}",
            where=self.job.where,
            hint="restore the files, or raise `max_unreadable` of the stage. The log says why each could not be read",
        )

    def _feed(self) -> Iterator[tuple[int, list[BlockTensors]]]:
        """Each step's own blocks on the device, the next steps' loaded and copied behind the current one's back."""
        self.seen: dict[int, tuple[int, int, _Ids, list[int]]] = {}
        copies = DeviceCopies(self.device)
        with self._loader(copies) as loader, closing(loader.steps(self.start, self.job.num_steps)) as steps:
            for step in range(self.start, self.job.num_steps):
                with out_of_memory_explained(self.job, f"while blocks of step {step + 1} were loaded"):
                    _, sent = next(steps)
                self.waited_s = loader.waited_s
                loaded = self._padded([one.block for one in sent], self.num_blocks)
                self._report_troubles(self.blocks)
                self._report_troubles(loader.source)
                own = [block for block in loaded if block.weight > 0]
                ids = {block.index: block.ids for block in own}
                num_replaced = sum(block.num_replaced for block in own)
                self.seen[step] = sum(map(_order, own)), num_replaced, ids, _unreadable(own)
                there = {tensors.index: tensors for tensors in copies.arrived(sent)}
                yield step, [replace(there[block.index], weight=block.weight) for block in loaded]

    @contextmanager
    def _loader(self, copies: DeviceCopies) -> Iterator[BlockLoader[SentBlock]]:
        """What loads this worker's blocks, in threads or processes as the job says."""
        first, most = self._loaders()
        wanted = self.job.elastic.loader_type
        assert self.job.blocks is not None
        processes = ProcessBlocks(self.job.blocks, self.num_blocks)
        # Others speak with a process of Ray's, which is one.
        may = getattr(self.blocks, "parallel", False)
        source: BlockSource = processes if may and wanted == "processes" else self.blocks
        own = self._asked(self.num_blocks)
        ahead = self.job.elastic.steps_ahead
        tried = processes if may and wanted == "auto" else None
        with closing(processes):
            yield BlockLoader(source, own, first, most, ahead, copies.send, processes=tried)

    def _loaders(self) -> tuple[int, int]:
        """How many loaders there are at first, and at most: this worker's share of its machine's processors."""
        here = zlib.crc32(socket.gethostname().encode())
        hosts = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        hosts[self.rank] = here
        beside = self.workers(hosts).tolist().count(here)
        wanted = self.job.elastic.loaders
        most = max(1, len(os.sched_getaffinity(0)) // beside) if wanted == "auto" else wanted
        return (1 if wanted == "auto" else most), most

    def _report_troubles(self, source: BlockSource) -> None:
        """Hand over what a source met since it was last asked."""
        if isinstance(source, ReportsTroubles):
            for what in source.pop_troubles():
                self.callback.trouble(what)

    def _load(self, step: int, source: BlockSource) -> list[Block]:
        """This worker's blocks of a source, all at once."""
        loaded = [source.load(step, index) for index in self._asked(source.num_blocks)]
        return self._padded(loaded, source.num_blocks)

    def _moved(self, blocks: list[Block]) -> list[BlockTensors]:
        copies = DeviceCopies(self.device)
        return copies.arrived([copies.send(block) for block in blocks])

    def _asked(self, num_blocks: int) -> list[int]:
        """This worker's blocks; the first where it has none."""
        return list(range(self.rank, num_blocks, self.world)) or [0]

    def _padded(self, loaded: list[Block], num_blocks: int) -> list[Block]:
        """As many blocks as each worker has; those that only pad have no weight."""
        blocks = loaded if self.rank < num_blocks else [replace(loaded[0], weight=0.0)]
        padding = -(-num_blocks // self.world) - len(blocks)
        return [*blocks, *(replace(blocks[0], weight=0.0) for _ in range(padding))]

    # --- start and end ------------------------------------------------------------------------------------------

    def _export(self, done: int) -> None:
        export_ema(self.engine, self.job.export(done), done)
        if self.rank == 0:
            # Progress: what follows reads and writes a large model for a while, too.
            exported = partial(self.callback.phase, "exported")
            exported()
            self.job.publish(done, exported)

    def _restore(self) -> int:
        manifest = reader.newest(self.job.checkpoint_storage, self.rank, self.world, self._all, self.device)
        if manifest is not None:
            self.engine.modules.state.clear()
            self.engine.modules.state.update(manifest.state)
            self.engine.skips = manifest.skips
            self.engine.unreadable = manifest.unreadable
            return reader.restore(manifest, self.engine)
        if self.job.start_from is not None:
            # An earlier stage's weights and moments; the count of this stage's steps starts anew.
            try:
                found = read_manifest(self.job.start_from)
                reader.restore(found, self.engine, compare=True, stored=self.job.start_in)
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


def _unreadable(blocks: list[Block]) -> list[int]:
    """The rows whose files could not be read, sorted."""
    return sorted({int(row) for block in blocks for row in block.unreadable})


def _precision(wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    return "bf16" if device != "cpu" and torch.cuda.is_bf16_supported() else "fp32"


def _accumulate(sums: dict[str, Tensor], losses: Losses, weight: float) -> dict[str, Tensor]:
    """Add a block's metrics to `sums`; returns what was added."""
    values = {"loss": losses.total, **losses.metrics}
    terms = {name: value.detach().double() * weight for name, value in values.items()}
    for name, term in terms.items():
        sums[name] = sums[name] + term if name in sums else term
    return terms


def _finite(value: float) -> bool:
    return value - value == 0.0
