"""The folders of one store: artifacts, ledger, work, logs, spool. Reading makes none of them."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.fsio import atomic_write
from orchestrator.names import parts_of
from orchestrator.pipeline.lease.lease_manager import Holder, Lease, LeaseManager
from orchestrator.pipeline.store.ledger import Ledger, PipelineState
from orchestrator.pipeline.store.spool_backup import SpoolBackup
from orchestrator.storage.artifacts import Artifact, ArtifactStore, folder_name
from orchestrator.storage.local import LocalStore, not_followed
from orchestrator.storage.open import folder_of, is_remote, open_store
from orchestrator.storage.s3 import S3Store
from orchestrator.storage.store import Store
from orchestrator.tracking import relocate
from orchestrator.training.checkpoint.storage import CheckpointStorage

_log = logging.getLogger(__name__)
# Where a job's checkpoints are below its work, and the pieces whose work lies elsewhere.
_CHECKPOINTS = "checkpoints"
_PIECES = "pieces.json"
# Beside the checkpoints of unfinished work: what it reads.
_BEGUN_FROM = "begun_from.json"
# The hold of who deletes what no pipeline needs, and what it does in words.
_DELETING, _DELETER = "gc", "`orchestrator gc`"


class Workspace:
    """Where one pipeline file keeps things.

    With a store in S3, or elsewhere by a user's package, the artifacts, the ledger, checkpoints of unfinished work,
    logs and a copy of the spool are there; what is in the making is below `root`, in this machine's cache of that
    store.

    Args:
        uri: the `store` of the pipeline file; a folder relative to the current directory, or `s3://…`.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._backups: dict[str, SpoolBackup] = {}
        self._local: LocalStore | None = None

    @cached_property
    def root(self) -> Path:
        """The folder on this machine."""
        if self._remote is not None:
            return self._remote.root
        return folder_of(self._uri)

    @cached_property
    def _remote(self) -> Store | None:
        if not is_remote(self._uri):
            return None
        store = open_store(self._uri)
        if isinstance(store, S3Store):
            # One early request says in seconds what is wrong with the settings; later ones have more patience.
            store.check()
        return store

    def exists(self) -> bool:
        """Whether anything may have been kept here."""
        return self._remote is not None or self.root.is_dir()

    def store(self) -> Store:
        """The store; a folder is made if it is missing.

        Raises:
            UserError: it cannot be used.
        """
        if self._remote is not None:
            return self._remote
        if self._local is None or not self._local.root.is_dir():
            self._local = LocalStore(self.root)
        return self._local

    def artifacts(self) -> ArtifactStore:
        """The store's artifacts; the store is made if it is missing."""
        return ArtifactStore(self.store())

    @property
    def artifacts_folder(self) -> Path:
        """Where artifacts are on this machine; may be missing."""
        return self._below("artifacts")

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact, or None."""
        return self.artifacts().find(kind, key) if self.exists() else None

    def intact(self, kind: str, key: str) -> Artifact | None:
        """The artifact on this machine, to be read: its content is what its manifest says. None if it is not whole."""
        return self.artifacts().intact(kind, key) if self.exists() else None

    def record(self, name: str, data: bytes) -> Path:
        """Keep a small object, and return a file on this machine that holds it."""
        store = self.store()
        store.put_bytes(name, data)
        path = store.local(name)
        if store.remote:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A copy: the store has it.
            atomic_write(path, data, durable=False)
        return path

    def tidy(self) -> None:
        """Clear away what dead processes left where nobody sees it; for drivers."""
        if isinstance(self._remote, S3Store):
            self._remote.abort_abandoned()

    @cached_property
    def leases(self) -> LeaseManager:
        """This process's holds in the store."""
        return LeaseManager(self.store())

    @contextlib.contextmanager
    def drive(self, pipeline: str, notify: Callable[[str], None] | None = None) -> Iterator[Lease]:
        """Hold the pipeline for this process alone, so as to run it.

        Raises:
            UserError: a living driver has it, somebody deletes from the store, or the store cannot be used.
        """
        with self._held(pipeline, notify) as lease:
            # Who deletes takes that hold first and looks for pipelines then: one of the two sees the other.
            self.leases.raise_unless_free(_DELETING, _DELETER)
            yield lease

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """While the `with` block runs, no pipeline of the store does, so that what none needs can be deleted.

        Raises:
            UserError: one runs, or another process deletes.
        """
        with ExitStack() as held:
            held.enter_context(self.leases.hold(_DELETING, _DELETER))
            for pipeline in self.pipelines():
                held.enter_context(self._held(pipeline))
            yield

    def pipelines(self) -> list[str]:
        """All pipelines that ever ran in the store, or are about to."""
        store = self.store()
        # A link in place of a ledger counts: whoever asks what is in it is told that it is not followed.
        ran = {
            name.split("/")[1]
            for name in store.list("ledger/")
            if name.count("/") > 1 or (not store.remote and (self.root / name).is_symlink())
        }
        prefix = f"holds/{pipeline_hold('')}"
        # What a hold's objects are called goes on after a dot, which no pipeline has in its name.
        return sorted(ran | {name.removeprefix(prefix).partition(".")[0] for name in store.list(prefix)})

    @contextlib.contextmanager
    def _held(self, pipeline: str, notify: Callable[[str], None] | None = None) -> Iterator[Lease]:
        highest = Ledger(self.store(), pipeline).epoch
        name = pipeline_hold(pipeline)
        with self.leases.hold(name, f"pipeline {pipeline!r}", above=highest, notify=notify) as lease:
            yield lease

    def driver(self, pipeline: str) -> Holder | None:
        """Who runs the pipeline, or died doing so. Takes some seconds if that is on another machine."""
        return self.leases.holder(pipeline_hold(pipeline)) if self.exists() else None

    def ledger(self, pipeline: str, lease: Lease) -> Ledger:
        """The pipeline's ledger, for the driver that holds the pipeline."""
        return Ledger(self.store(), pipeline, lease)

    def state(self, pipeline: str) -> PipelineState:
        """What the ledger says now."""
        return Ledger(self.store(), pipeline).state if self.exists() else PipelineState()

    def work(self, kind: str, key: str) -> Path:
        """The folder of unfinished work on one key: it outlives the attempt, and the driver.

        Raises:
            UserError: a link has its name: what is below it is not ours to change.
        """
        folder = self._below(f"work/{folder_name(kind, key)}")
        if folder.is_symlink():
            raise not_followed(folder)
        return folder

    def remote_work(self, kind: str, key: str) -> tuple[Store, str] | None:
        """The store and the prefix there of what must outlive this machine too; None if `work` does already."""
        return None if self._remote is None else (self._remote, f"work/{folder_name(kind, key)}/")

    def reached(self, kind: str, key: str) -> str:
        """How far the unfinished work on a key is, by its newest checkpoint: `step 40`; of each piece if it has any.

        Nothing if there is no checkpoint.
        """
        if not self.exists():
            return ""
        step = self._newest_step(kind, key)
        if step is not None:
            return f"step {step}"
        found = []
        for name, (piece_kind, piece_key) in sorted(self.pieces(folder_name(kind, key)).items()):
            step = self._newest_step(piece_kind, piece_key)
            if step is not None:
                found.append(f"step {step} ({name})")
        return ", ".join(found)

    def note_piece(self, kind: str, key: str, name: str, piece_kind: str, piece_key: str) -> None:
        """Put down whose piece of work the unfinished work on (`piece_kind`, `piece_key`) is."""
        folder = folder_name(kind, key)
        pieces = {**self.pieces(folder), name: (piece_kind, piece_key)}
        self.store().put_bytes(f"work/{folder}/{_PIECES}", json.dumps(pieces).encode())

    def pieces(self, folder: str) -> dict[str, tuple[str, str]]:
        """Kinds and keys of the pieces that the unfinished work in a folder of `work/` is on, by name."""
        try:
            found: Any = json.loads(self.store().get_bytes(f"work/{folder}/{_PIECES}"))
            return {str(name): (str(kind), str(key)) for name, (kind, key) in found.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError):
            return {}

    def note_begun(self, kind: str, key: str, digests: Mapping[str, str]) -> None:
        """Put down of which content, by role, the unfinished work on a key is made."""
        text = json.dumps(dict(sorted(digests.items())))
        self.store().put_bytes(f"work/{folder_name(kind, key)}/{_BEGUN_FROM}", text.encode())

    def begun_from(self, kind: str, key: str) -> dict[str, str] | None:
        """What :meth:`note_begun` put down; None if there is no such work, or an earlier version began it."""
        if not self.exists():
            return None
        try:
            found: Any = json.loads(self.store().get_bytes(f"work/{folder_name(kind, key)}/{_BEGUN_FROM}"))
            return {str(role): str(digest) for role, digest in found.items()}
        except (FileNotFoundError, ValueError, AttributeError, RecursionError):
            return None

    def _newest_step(self, kind: str, key: str) -> int | None:
        remote = self.remote_work(kind, key)
        folder = self.work(kind, key) / _CHECKPOINTS
        target = (
            CheckpointStorage(folder)
            if remote is None
            else CheckpointStorage(folder, remote[0], remote[1] + _CHECKPOINTS)
        )
        return next(iter(target.committed()), None)

    def drop_work(self, kind: str, key: str) -> None:
        """Remove the work on a key whose artifact is there.

        The files nearest the top go first: a manifest lies above what it lists, so whoever looks meanwhile, or
        after a kill halfway, never sees one whose files are gone. What the work was begun from goes last: without
        it, checkpoints that are still there would be taken for those of the present inputs.
        """
        folder = self.work(kind, key)
        for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=removal_order):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        remote = self.remote_work(kind, key)
        if remote is not None:
            store, prefix = remote
            for name in sorted(store.list(prefix), key=removal_order):
                store.delete(name)

    def log_path(self, pipeline: str, stage: str) -> Path:
        """The log of a stage, all attempts; see also :meth:`kept_log`."""
        return self._below(_log_name(pipeline, stage))

    @contextlib.contextmanager
    def kept_log(self, pipeline: str, stage: str) -> Iterator[Path]:
        """The log of a stage, to be added to; it goes to the store when the attempt ends, if it can."""
        path = self.bring_log(pipeline, stage)
        try:
            yield path
        finally:
            if self._remote is not None:
                with _tolerant(f"the log of stage {stage!r} stays on this machine"):
                    self._remote.put_file(_log_name(pipeline, stage), path)

    def bring_log(self, pipeline: str, stage: str) -> Path:
        """The log of a stage, fetched from the store if this machine has none or a shorter one."""
        path = self.log_path(pipeline, stage)
        if self._remote is not None:
            with _tolerant(f"the older log of stage {stage!r} stays in the store"):
                kept = self._remote.stat(_log_name(pipeline, stage))
                if kept is not None and (not path.exists() or path.stat().st_size < kept.size):
                    self._remote.get_file(_log_name(pipeline, stage), path)
        return path

    def spool(self, pipeline: str) -> Path:
        """Where the pipeline's tracking records wait for the server."""
        return self._below(f"spool/{pipeline}")

    def spool_backup(self, pipeline: str) -> SpoolBackup | None:
        """What keeps the spool in the store too; None if it is there already."""
        if self._remote is None:
            return None
        if pipeline not in self._backups:
            self._backups[pipeline] = SpoolBackup(self._remote, f"spool/{pipeline}/", self.spool(pipeline))
        return self._backups[pipeline]

    def _below(self, name: str) -> Path:
        # Links below a store are its owner's; no name leads out of it.
        return self.root.joinpath(*parts_of(name))

    @property
    def tracked_files(self) -> str | None:
        """Where MLflow is to keep the artifacts of new experiments; None leaves that to it."""
        # Of stores elsewhere MLflow knows S3 only.
        return f"{self._remote.uri}/{relocate.FOLDER}" if isinstance(self._remote, S3Store) else None

    def has_tracked_files(self) -> bool:
        """Whether anything is there."""
        return (
            self._remote is not None
            and next(iter(self._remote.list(f"{relocate.FOLDER}/")), None) is not None
        )


def pipeline_hold(pipeline: str) -> str:
    """The hold of the pipeline's driver."""
    return f"pipeline-{pipeline}"


def work_hold(kind: str, key: str) -> str:
    """The hold of whoever works on the key."""
    return f"work-{folder_name(kind, key)}"


def removal_order(name: str | Path) -> tuple[bool, int]:
    """The order in which files of a folder of the store are removed, see :meth:`Workspace.drop_work`."""
    return Path(name).name == _BEGUN_FROM, str(name).count("/")


def _log_name(pipeline: str, stage: str) -> str:
    return f"logs/{pipeline}/{stage}.log"


@contextlib.contextmanager
def _tolerant(otherwise: str) -> Iterator[None]:
    """A log is not worth a failed stage."""
    try:
        yield
    except OSError as error:
        _log.warning("%s: %s", otherwise, error)
