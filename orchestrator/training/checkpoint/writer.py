"""Saving without stopping: a copy of this worker's shards to host memory, and one thread that writes it out.

The only stall is the copy. No collective happens here: workers agree in the training loop that all have written
their files, and worker 0 then writes the manifest that makes the checkpoint exist.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, cast

import torch
import torch.distributed as dist

from orchestrator import disk
from orchestrator.training.checkpoint import reader, shard_file
from orchestrator.training.checkpoint.format import (
    COMMIT,
    FORMAT,
    CheckpointError,
    part_name,
    shard_name,
    step_name,
)
from orchestrator.training.checkpoint.shard_file import TensorSlot, file_header
from orchestrator.training.checkpoint.storage import CheckpointStorage
from orchestrator.training.device import assigned_gpus
from orchestrator.training.engine import Engine

logger = logging.getLogger("orchestrator")

_VERSIONS = ("dinov3-orchestrator", "torch", "deepspeed", "safetensors")


class CheckpointWriter:
    """Writes one worker's part of each checkpoint behind training's back.

    Args:
        storage: where checkpoints go.
        token: of this group of workers, from `CheckpointStorage.take`.
        keep: newest committed checkpoints that stay.
        keep_every: those of steps that are multiples of it stay too; None for none.
        meta: what else the manifest says (job, seed, …).

    Attributes:
        pending: the step that is being written, until `commit` or `drop`.
        committed: the newest step whose manifest this worker has written; None on all but worker 0.
        stall_s: seconds the caller has lost in `begin`, all in all.
        last_stall_s: seconds lost in the newest `begin`.
        last_write_s: seconds it took to write (and upload) this worker's newest file.
        last_bytes: that file's size.
    """

    def __init__(
        self,
        storage: CheckpointStorage,
        *,
        token: str,
        keep: int,
        keep_every: int | None,
        meta: Mapping[str, Any],
    ) -> None:
        self.storage, self.token, self.meta = storage, token, dict(meta)
        self.keep, self.keep_every = keep, keep_every
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.pending: int | None = None
        self.committed: int | None = None
        self.stall_s = self.last_stall_s = self.last_write_s = 0.0
        self.last_bytes = 0
        self._updates = 0
        self._state: dict[str, Any] = {}
        self._slots: dict[str, TensorSlot] = {}
        self._header = b""
        self._host = torch.empty(0)
        self._allocated: Future[None] | None = None
        self._thread = _Background()
        self._written: Future[None] | None = None
        self._manifest_put: Future[None] | None = None
        if self.rank == 0:
            self._thread.submit(self._sweep)

    def prepare(self, engine: Engine) -> None:
        """Make the host buffer in the background, so that the first `begin` need not. Collective at ZeRO 1 and 2."""
        self._slots = _slots(engine)
        self._header = file_header(self._slots)
        self._allocated = self._thread.submit(self._allocate)

    def begin(self, engine: Engine, step: int) -> None:
        """Copy this worker's shards and start to write them. Waits for the file before it, if any.

        A pending step that was not committed by then is given up. Collective at ZeRO 1 and 2.
        """
        started = time.monotonic()
        if self._written is not None:
            self._written.exception()  # its buffer is used again; whether it failed, `written` tells
        self._copy(engine)
        self.pending, self._updates = step, engine.updates
        # What the manifest says besides, as it is now: training goes on before that is written.
        self._state = {
            "state": dict(engine.modules.state),
            "skipped": engine.skips.saved(),
            "unreadable": sorted(engine.unreadable),
        }
        self._written = self._thread.submit(lambda: self._write(step))
        self.last_stall_s = time.monotonic() - started
        self.stall_s += self.last_stall_s

    def written(self) -> bool:
        """Whether this worker's part of the pending step is durable.

        Raises:
            CheckpointError: it could not be written; the cause is the system's error. Training may go on: `drop`
                the step on all workers, and try again later.
        """
        assert self._written is not None, "nothing is pending"
        if not self._written.done():
            return False
        self._written.result()
        return True

    def wait(self) -> None:
        """Wait until this worker's part is durable. Raises CheckpointError as `written` does."""
        assert self._written is not None, "nothing is pending"
        self._written.result()

    def commit(self) -> None:
        """Make the pending step a checkpoint; to be called by all workers once all have written."""
        assert self.pending is not None, "nothing is pending"
        step, updates, state = self.pending, self._updates, self._state
        self.pending = self._written = None
        if self.rank == 0:
            self._manifest_put = self._thread.submit(lambda: self._commit(step, updates, state))
        self._thread.submit(lambda: self.storage.forget(step, self.keep))

    def drop(self) -> None:
        """Give the pending step up; to be called by all workers. What was written of it is pruned later."""
        self.pending = None

    def finish(self) -> None:
        """Wait for everything handed over.

        Raises:
            CheckpointError: the newest file or manifest could not be written, so that checkpoint does not exist.
        """
        self._thread.submit(lambda: None).result()
        if self._manifest_put is not None:
            self._manifest_put.result()
        if self.pending is not None:
            self.wait()

    # --- copying ----------------------------------------------------------------------------------------------

    def _copy(self, engine: Engine) -> None:
        if self._allocated is None:
            self.prepare(engine)
        assert self._allocated is not None
        self._allocated.result()
        for key, shard in reader.shards(engine):
            slot = self._slots[key]
            self._host[slot.start : slot.start + slot.length].copy_(shard.data, non_blocking=True)
        if assigned_gpus():
            torch.cuda.current_stream().synchronize()

    # --- in the background ------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        total = sum(slot.length for slot in self._slots.values())
        # Writing to it makes its pages there: page faults take longer than the copy.
        self._host = torch.empty(total, dtype=torch.float32, pin_memory=bool(assigned_gpus())).zero_()

    def _sweep(self) -> None:
        try:
            self.storage.sweep(self.token)
        except Exception as error:
            logger.warning(
                "files that earlier workers left in %s cannot be removed: %s", self.storage.folder, error
            )

    def _write(self, step: int) -> None:
        started = time.monotonic()
        folder, shard = step_name(step), shard_name(self.token, self.rank, self.world)
        needed = len(self._header) + self._host.nbytes
        data = memoryview(cast(Any, self._host.numpy().view("uint8")))
        with _explained(self.storage, f"{folder}/{shard}", needed):
            entry = shard_file.write_file(self.storage.folder / folder / shard, self._header, data)
            self.storage.publish(f"{folder}/{shard}")
            part = json.dumps(entry).encode()
            self.storage.put(f"{folder}/{part_name(self.token, self.rank, self.world)}", part)
        self.last_write_s, self.last_bytes = time.monotonic() - started, needed

    def _commit(self, step: int, updates: int, state: Mapping[str, Any]) -> None:
        try:
            with _explained(self.storage, f"{step_name(step)}/{COMMIT}"):
                # First of all: a newer group removes what an older one left, and that would look like damage.
                self.storage.check_owner(self.token)
                self.storage.commit(step, self.token, self._manifest(step, updates, state))
        except CheckpointError as error:
            logger.warning("checkpoint %d does not exist: %s", step, error)
            raise
        self.committed = step
        try:
            self.storage.prune(step, self.token, self.keep, self.keep_every)
        except Exception as error:
            logger.warning("old checkpoints in %s could not be pruned: %s", self.storage.folder, error)

    def _manifest(self, step: int, updates: int, state: Mapping[str, Any]) -> bytes:
        files = {
            shard_name(self.token, rank, self.world): json.loads(
                self.storage.read(f"{step_name(step)}/{part_name(self.token, rank, self.world)}")
            )
            for rank in range(self.world)
        }
        manifest = {
            "format": FORMAT,
            "step": step,
            # Updates outlive a stage, steps do not: AdamW's bias correction goes by all updates ever made.
            "updates": updates,
            "num_workers": self.world,
            **state,
            "token": self.token,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "meta": self.meta,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
            "keys": {key: slot.numel for key, slot in self._slots.items()},
            "files": files,
        }
        return json.dumps(manifest, indent=1).encode()


def _slots(engine: Engine) -> dict[str, TensorSlot]:
    """The places of this worker's shards in its file; the last workers' may be empty."""
    slots: dict[str, TensorSlot] = {}
    start = 0
    for key, shard in reader.shards(engine, fresh=True):
        slots[key] = TensorSlot(start, shard.data.numel(), shard.offset, shard.numel)
        start += shard.data.numel()
    return slots


@contextlib.contextmanager
def _explained(storage: CheckpointStorage, name: str, needed: int | None = None) -> Iterator[None]:
    """Any failure as a CheckpointError that names the file and, where the disk is full, what was lacking."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        lacking = f" ({disk.room(storage.folder, needed)})" if disk.is_full(error) else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"{storage.folder / name} cannot be written: {reason or type(error).__name__}{lacking}"
        ) from error


class _Background:
    """One thread that does what it is handed, in order. It never keeps the process from ending."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def submit(self, task: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._queue.put((future, task))
        return future

    def _run(self) -> None:
        while True:
            future, task = self._queue.get()
            try:
                task()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
