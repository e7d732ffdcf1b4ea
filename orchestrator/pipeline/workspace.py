"""The folders of one store: artifacts, ledger, work, logs, spool. Reading makes none of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.pipeline.ledger import Ledger, PipelineState
from orchestrator.store.artifact import Artifact, ArtifactStore
from orchestrator.store.local import LocalStore, open_store


class Workspace:
    """Where one pipeline file keeps things.

    Args:
        uri: the `store` of the pipeline file; a folder relative to the current directory.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.root = Path(uri.removeprefix("file://")).expanduser().absolute()

    def exists(self) -> bool:
        """Whether anything was ever kept here."""
        return self.root.is_dir()

    def store(self) -> LocalStore:
        """The store; made if it is missing."""
        return open_store(self._uri)

    def artifacts(self) -> ArtifactStore:
        """The store's artifacts; the store is made if it is missing."""
        return ArtifactStore(self.store())

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact, or None."""
        return self.artifacts().find(kind, key) if self.exists() else None

    def ledger(self, pipeline: str) -> Ledger:
        """The pipeline's ledger, for the driver that holds its lock."""
        return Ledger(self.store(), pipeline)

    def state(self, pipeline: str) -> PipelineState:
        """What the ledger says now."""
        return self.ledger(pipeline).state if self.exists() else PipelineState()

    def lock_path(self, pipeline: str) -> Path:
        """Held by the driver of the pipeline."""
        return self.root / "ledger" / pipeline / "driver.lock"

    def work(self, kind: str, key: str) -> Path:
        """The folder of unfinished work on one key: it outlives the attempt, and the driver."""
        return self.root / "work" / f"{kind}-{key[:16]}"

    def work_lock(self, kind: str, key: str) -> Path:
        """Held by whoever works on the key."""
        return self.root / "work" / f"{kind}-{key[:16]}.lock"

    def drop_work(self, kind: str, key: str) -> None:
        """Remove the work on a key whose artifact is there."""
        shutil.rmtree(self.work(kind, key), ignore_errors=True)
        self.work_lock(kind, key).unlink(missing_ok=True)

    def log_path(self, pipeline: str, stage: str) -> Path:
        """The log of a stage, all attempts."""
        return self.root / "logs" / pipeline / f"{stage}.log"

    def spool(self, pipeline: str) -> Path:
        """Where the pipeline's tracking records wait for the server."""
        return self.root / "spool" / pipeline
