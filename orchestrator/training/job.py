"""What one elastic job is: everything its workers need to know, and where its results are. No torch here."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from orchestrator.byte_counts import BYTES
from orchestrator.config.elastic import Elastic, Resources
from orchestrator.config.schedules import Optimizer
from orchestrator.config.zero_stage import ZeroStage
from orchestrator.fsio import DIGESTS, folder_beside, link_or_copy, move
from orchestrator.storage.open import Needed
from orchestrator.storage.store import HasRanges, Store
from orchestrator.training.checkpoint.format import COMMIT, CheckpointError, read, step_name, verified
from orchestrator.training.checkpoint.storage import CheckpointStorage
from orchestrator.training.handed_over import hand_over, note, plain_files, put_noted, refer_to_all

if TYPE_CHECKING:
    from orchestrator.data.blocks import BlockSource
    from orchestrator.training.task import Task

T = TypeVar("T")
logger = logging.getLogger("orchestrator")

REDUCE_BUCKET = 500_000_000
"""Weights whose gradients ZeRO reduces at once, at most. Each worker holds a buffer of so many in fp32."""


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to train; sent to it by its driver, so all that `for_workers` leaves pickles.

    Attributes:
        name: in logs and reports, such as `pretrain` or `distill/vit-nano`.
        task: makes the task; called in every worker.
        num_blocks: blocks of a step.
        num_steps: optimizer updates of the whole job.
        optimizer: AdamW and its schedules.
        zero_stage: how weights are spread over the workers.
        precision: `auto` is bf16 where a GPU has it, else fp32.
        work: the job's folder; checkpoints and exports live below it.
        seed: of weight initialisation.
        start_from: a committed checkpoint of an earlier stage to begin with, weights and moments.
        start_in: the store, and the prefix in it with a slash at its end, that has the files of `start_from`, where no
            more than its manifest is on the machines.
        export_steps: after these many steps the EMA is exported to `exports/step-….safetensors`; the last
            step always is.
        elastic: workers, what each one's slot asks Ray for, checkpoint interval and what to keep.
        blocks: makes the dataset; called in every worker.
        slot_blocks: makes it instead where it has to live in a process of Ray's; called in every slot.
        remote: the store, and the prefix in it, that keeps checkpoints and exports where `work` does not outlive
            its machine; the prefix ends with a slash.
        inputs: artifacts that workers need a copy of on their own machine.
        limit: min_workers and max_workers just now, in place of `elastic.workers`; the controller asks it again
            and again, and the group follows at the end of a step.
        validation: makes the source of held-out blocks; called in every worker. All of its blocks are looked at.
        validate_every: steps from one look at them to the next; 0: never.
        probe: makes the source of what the task looks at its weights with, see `training.task.Probing`; called in every
            worker. Its blocks are loaded once.
        probe_every: steps from one such look to the next. There is one before the first step, and after the last.
        pipeline: the pipeline's name.
        max_unreadable: number of photos that its workers, all attempts together, may find unreadable; None is any.
        finish: makes, from the last export (a file) and into an empty folder, what users get of the trained model;
            called in worker 0, so that no weights pass through the driver. See :meth:`finished`.
    """

    name: str
    task: Callable[[], Task]
    num_blocks: int
    num_steps: int
    optimizer: Optimizer
    zero_stage: ZeroStage
    precision: str
    work: Path
    seed: int
    elastic: Elastic
    start_from: Path | None = None
    start_in: tuple[HasRanges, str] | None = None
    export_steps: tuple[int, ...] = ()
    blocks: Callable[[], BlockSource] | None = None
    slot_blocks: Callable[[], BlockSource] | None = None
    remote: tuple[Store, str] | None = None
    inputs: tuple[Needed, ...] = ()
    limit: Callable[[], tuple[int, int]] | None = None
    validation: Callable[[], BlockSource] | None = None
    validate_every: int = 0
    probe: Callable[[], BlockSource] | None = None
    probe_every: int = 0
    pipeline: str = ""
    max_unreadable: int | None = None
    finish: Callable[[Path, Path], None] | None = None

    def for_workers(self) -> Job:
        """The job as workers get it: what lives in slots, or in the driver, stays there."""
        return replace(self, slot_blocks=None, limit=None)

    @property
    def resources(self) -> Resources:
        """What the slot of each worker asks Ray for."""
        return self.elastic.resources

    @property
    def run_name(self) -> str:
        """The name of its Ray Train run: `pipeline/stage` or `pipeline/stage/student`."""
        return f"{self.pipeline}/{self.name}" if self.pipeline else self.name

    @property
    def where(self) -> str:
        """The part of the pipeline file that describes it."""
        stage, _, student = self.name.partition("/")
        return f"stages.{stage}.students.{student}" if student else f"stages.{stage}"

    @property
    def checkpoint_uri(self) -> str:
        """Where its elastic checkpoints are, as an address."""
        if self.remote is None:
            return self.checkpoints.absolute().as_uri()
        store, prefix = self.remote
        return f"{store.uri.rstrip('/')}/{prefix}checkpoints"

    @property
    def checkpoints(self) -> Path:
        """Where this job's elastic checkpoints are on this machine."""
        return self.work / "checkpoints"

    @property
    def checkpoint_storage(self) -> CheckpointStorage:
        """Where this job's elastic checkpoints go."""
        if self.remote is None:
            return CheckpointStorage(self.checkpoints)
        store, prefix = self.remote
        return CheckpointStorage(self.checkpoints, store, f"{prefix}checkpoints/")

    def export(self, step: int) -> Path:
        """Where the EMA after `step` updates is exported to."""
        return self.work / "exports" / f"step-{step:08d}.safetensors"

    @property
    def finished(self) -> Path:
        """What `finish` made: there once it is whole."""
        return self.work / "finished"

    @property
    def final_checkpoint(self) -> Path:
        """The checkpoint after the last step, on this machine."""
        return self.checkpoints / step_name(self.num_steps)

    def is_done(self) -> bool:
        """Whether the last checkpoint and export are there, so that nothing is left to train.

        A checkpoint on this machine that is damaged is not there: the steps since the one before are done again. One
        in a store is compared by who reads it.
        """
        if self.remote is None:
            exported = self.export(self.num_steps).exists() and (
                self.finish is None or self.finished.is_dir()
            )
            return exported and _is_whole(self.final_checkpoint)
        store, prefix = self.remote
        names = (
            f"checkpoints/{self.final_checkpoint.name}/{COMMIT}",
            f"exports/{self.export(self.num_steps).name}",
        )
        # A job that an earlier version exported has nothing there yet.
        finished = self.finish is None or any(store.list(f"{prefix}{self.finished.name}/"))
        return finished and all(store.stat(f"{prefix}{name}") is not None for name in names)

    def fetch_export(self, step: int) -> Path:
        """The export after `step` updates, brought to this machine if the job keeps it elsewhere.

        Raises:
            FileNotFoundError: there is none.
        """
        path = self.export(step)
        if self.remote is not None:
            store, _ = self.remote
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(self._stored(path), path)
            BYTES.read("checkpoint", path.stat().st_size)
        return path

    def publish(self, step: int, progress: Callable[[], None] = lambda: None) -> None:
        """Make the export after `step` updates readable by everybody, and what `finish` makes of the last (worker 0).

        The last export comes last: once it is in the store, the job is done.

        Args:
            step: updates that were done.
            progress: called after each part that takes long of a large model, so that nobody takes it for a hang.
        """
        if step == self.num_steps and self.finish is not None:
            self._finish(self.export(step), self.finish, progress)
        self._upload(self.export(step))
        progress()

    def make_finished(self, step: int, finish: Callable[[Path, Path], T]) -> T:
        """Make what users get of the export after `step` updates; returns what `finish` returns.

        For who chooses the step after training, in place of :attr:`finish`. Any process that has the job may call it.

        Raises:
            FileNotFoundError: that step was not exported.
        """
        return self._finish(self.fetch_export(step), finish, lambda: None)

    def _finish(self, export: Path, finish: Callable[[Path, Path], T], progress: Callable[[], None]) -> T:
        shutil.rmtree(self.finished, ignore_errors=True)
        with folder_beside(self.finished) as draft:
            made = draft / self.finished.name
            made.mkdir()
            returned = finish(export, made)
            progress()
            for path in plain_files(made):
                note(path)
                progress()
            move(made, self.finished)
        for path in plain_files(self.finished):
            self._upload(path)
            progress()
        return returned

    def _upload(self, path: Path) -> None:
        if self.remote is not None:
            put_noted(self.remote[0], self._stored(path), path)
            BYTES.written("checkpoint", path.stat().st_size)

    def _stored(self, path: Path) -> str:
        """The name in the store of a file of the job's folder."""
        assert self.remote is not None
        return f"{self.remote[1]}{path.relative_to(self.work).as_posix()}"

    def adopt(self, checkpoint: Path, exports: Mapping[int, Path]) -> None:
        """Go on from the last checkpoint of a shorter job, unless this one has one of its own already.

        Args:
            checkpoint: its folder.
            exports: what that job exported, by step, as far as this one exports it too.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        if self.checkpoint_storage.committed():
            return
        for step, file in exports.items():
            self.export(step).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, self.export(step))
            self._upload(self.export(step))
        # Last: once it is there, nothing of the shorter job is looked at again.
        self.checkpoint_storage.adopt(checkpoint)

    def collect(self, folder: Path) -> None:
        """Link the last checkpoint, without what other groups left beside it, into `folder`.

        What is kept in a store stays there: `folder` gets references to it. The sha256 of the files are those that the
        workers wrote into the checkpoint's manifest.

        Raises:
            CheckpointError: its manifest is damaged, or was never written.
        """
        if self.remote is not None:
            self.checkpoint_storage.refer(self.num_steps, folder)
            return
        files = read(self.final_checkpoint).files
        for name in (*files, COMMIT):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(self.final_checkpoint / name, folder / name)
        for name, entry in files.items():
            DIGESTS.note(folder / name, entry["sha256"])

    def collect_exports(self, folder: Path) -> None:
        """Link all exports into `folder`, or refer to them, as :meth:`collect`."""
        folder.mkdir()
        self._collect("exports", folder)

    def collect_finished(self, folder: Path) -> None:
        """Link what `finish` made into `folder`, or refer to it, as :meth:`collect`."""
        self._collect(self.finished.name, folder)

    def _collect(self, what: str, folder: Path) -> None:
        if self.remote is not None:
            store, prefix = self.remote
            refer_to_all(store, f"{prefix}{what}/", folder)
            return
        for path in plain_files(self.work / what):
            target = folder / path.relative_to(self.work / what)
            target.parent.mkdir(parents=True, exist_ok=True)
            hand_over(path, target)


def _is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / COMMIT).exists():
        return False
    try:
        verified(checkpoint)
    except CheckpointError as error:
        logger.warning("the last checkpoint is made again: %s: %s", checkpoint, error)
        return False
    return True
