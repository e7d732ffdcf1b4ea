"""Runs as the engine and the stages see them. Nothing here waits for MLflow or raises because of it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from orchestrator.tracking.backlog import Outage, noted_outage, progress, sent
from orchestrator.tracking.connect import absolute_uri
from orchestrator.tracking.flusher import Counts, Flusher
from orchestrator.tracking.mlflow_writer import MlflowWriter
from orchestrator.tracking.spool import Record, Spool, clean_name

Status = Literal["FINISHED", "FAILED", "KILLED"]
# Seconds without an answer after which nobody waits for MLflow any more.
PATIENCE_S = 15.0


@dataclass(frozen=True)
class Dataset:
    """What a run reads.

    Attributes:
        name: for people.
        digest: of the content, hex; MLflow keeps the first 36 digits.
        uri: where it is.
        profile: figures of it, plain JSON.
        used_for: such as `training`.
    """

    name: str
    digest: str
    uri: str
    profile: Mapping[str, Any] = field(default_factory=dict)
    used_for: str = "training"


@dataclass(frozen=True)
class ModelRecord:
    """A model that a run made.

    Attributes:
        name: for people.
        kind: such as `vit_nano`.
        folder: its files, which nobody changes any more, in an artifact of the store: a path below the store's
            artifacts, so that the store may be moved, or an absolute one; None leaves them where `tags` says.
        texts: further small files, by name.
        params: dotted names or nested.
        tags: likewise.
        metrics: figures of it.
        step: the optimizer step that it was made after.
    """

    name: str
    kind: str
    folder: Path | None
    texts: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0


class Run(ABC):
    """One run of the pipeline, of a stage or of a student.

    Attributes:
        run_id: our own id, known at once and kept across resumes. MLflow's id follows: `mlflow_run_id`.
        tracking_uri: the MLflow server, or None if nothing is tracked.
    """

    run_id: str
    tracking_uri: str | None

    @abstractmethod
    def child(self, name: str, resume_id: str | None = None) -> Run:
        """A run nested under this one; with `resume_id` that very run, RUNNING again."""

    @abstractmethod
    def params(self, values: Mapping[str, Any]) -> None:
        """Sets params; nested mappings become dotted names. One that is set already stays, and the new value
        goes to the tag `drift.<name>`."""

    @abstractmethod
    def tags(self, values: Mapping[str, Any]) -> None:
        """Sets or replaces tags; nested mappings become dotted names."""

    @abstractmethod
    def metrics(self, values: Mapping[str, float], step: int, channel: str = "train") -> bool:
        """Records all metrics of a channel's step, in MLflow as `channel/name`.

        Returns False, and records nothing, if this step of the channel was recorded before (a replayed step).
        """

    @abstractmethod
    def file(self, path: Path, folder: str | None = None) -> None:
        """Uploads a copy of `path` as it is now, below `folder` of the run's artifacts. For small files."""

    def text(self, name: str, text: str, folder: str | None = None) -> None:
        """Uploads a small file with this content."""
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / name
            path.write_text(text, encoding="utf-8")
            self.file(path, folder)

    def datasets(self, used: Sequence[Dataset]) -> None:
        """Says what the run reads. Saying it again changes nothing."""
        return

    def model(self, made: ModelRecord) -> None:
        """Says which model the run made. One of each name a run."""
        return

    def children(self) -> Mapping[str, Run]:
        """The runs below this one, by name."""
        return {}

    def since(self, position: int) -> tuple[list[Record], int]:
        """What `metrics` recorded after a position, of all channels, and the position after it. 0 is the start."""
        return [], position

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Ends the run, and what a crash left open below it."""

    @abstractmethod
    def history(self, channel: str = "train") -> list[Record]:
        """What `metrics` recorded, over all attempts: dicts of step, time_ms, channel and metrics."""

    def secure(self) -> bool:
        """Make what was recorded outlive this machine; False if that is not possible now. May take seconds."""
        return True

    @abstractmethod
    def mlflow_run_id(self, timeout: float = 0.0) -> str | None:
        """MLflow's id of this run. Waits for it until MLflow has taken nothing for `timeout` seconds."""

    def outage(self) -> Outage | None:
        """Why MLflow takes nothing now, and since when; None if that is not known, or it does."""
        return None


class SpooledRun(Run):
    """A run whose records go through a spool. Light to pickle; works in any process that sees the folder."""

    def __init__(self, spool: Spool, run_id: str, tracking_uri: str) -> None:
        self._spool = spool
        self.run_id = run_id
        self.tracking_uri = tracking_uri

    def child(self, name: str, resume_id: str | None = None) -> SpooledRun:
        """See :class:`Run`."""
        return open_run(self._spool, self.tracking_uri or "", name, resume_id, parent=self.run_id)

    def params(self, values: Mapping[str, Any]) -> None:
        """See :class:`Run`."""
        self._post("params", params=flatten(values))

    def tags(self, values: Mapping[str, Any]) -> None:
        """See :class:`Run`."""
        self._post("tags", tags=flatten(values))

    def metrics(self, values: Mapping[str, float], step: int, channel: str = "train") -> bool:
        """See :class:`Run`."""
        numbers = {name: float(value) for name, value in values.items()}
        with self._spool.losses_logged():
            return self._spool.append(self.run_id, step, numbers, channel=channel)
        return False

    def file(self, path: Path, folder: str | None = None) -> None:
        """See :class:`Run`."""
        if not path.is_file():
            raise FileNotFoundError(path)
        with self._spool.losses_logged():
            # The caller may change or remove the file long before it can be uploaded.
            copy = uuid.uuid4().hex
            target = self._spool.files(self.run_id) / copy / path.name
            target.parent.mkdir(parents=True)
            shutil.copyfile(path, target)
            self._spool.post(self.run_id, "file", name=path.name, copy=copy, folder=folder)

    def datasets(self, used: Sequence[Dataset]) -> None:
        """See :class:`Run`."""
        if used:
            self._post("datasets", datasets=[asdict(one) for one in used])

    def model(self, made: ModelRecord) -> None:
        """See :class:`Run`."""
        self._post(
            "model",
            name=made.name,
            kind=made.kind,
            folder=made.folder.as_posix() if made.folder else None,
            texts=dict(made.texts),
            params=flatten(made.params),
            tags=flatten(made.tags),
            metrics={clean_name(name): float(value) for name, value in made.metrics.items()},
            step=made.step,
        )

    def children(self) -> Mapping[str, Run]:
        """See :class:`Run`."""
        return {
            name: SpooledRun(self._spool, run_id, self.tracking_uri or "")
            for run_id, name in self._spool.children(self.run_id).items()
        }

    def since(self, position: int) -> tuple[list[Record], int]:
        """See :class:`Run`."""
        read = self._spool.read(self.run_id, position)
        found = [record for record, _ in read if record["op"] == "metrics"]
        return found, read[-1][1] if read else position

    def finish(self, status: Status) -> None:
        """See :class:`Run`."""
        with self._spool.losses_logged():
            for child in self._spool.open_children(self.run_id):
                SpooledRun(self._spool, child, self.tracking_uri or "").finish(status)
        self._post("finish", status=status)

    def history(self, channel: str = "train") -> list[Record]:
        """See :class:`Run`."""
        return self._spool.history(self.run_id, channel)

    def secure(self) -> bool:
        """See :class:`Run`."""
        return self._spool.secure()

    def mlflow_run_id(self, timeout: float = 0.0) -> str | None:
        """See :class:`Run`."""
        deadline, before = time.monotonic() + timeout, -1
        while True:
            found = progress(self._spool, self.run_id).mlflow_run_id
            if found is not None or time.monotonic() >= deadline:
                return found
            # Records of other runs may come first.
            if (now := sent(self._spool)) != before:
                deadline, before = time.monotonic() + timeout, now
            time.sleep(0.05)

    def outage(self) -> Outage | None:
        """See :class:`Run`."""
        return noted_outage(self._spool)

    def _post(self, op: str, **payload: Any) -> None:
        with self._spool.losses_logged():
            self._spool.post(self.run_id, op, **payload)


class NullRun(Run):
    """A run that is not tracked: it keeps its metrics in memory and drops the rest."""

    def __init__(self) -> None:
        self.run_id = uuid.uuid4().hex
        self.tracking_uri = None
        self._records: dict[tuple[str, int], Record] = {}

    def child(self, name: str, resume_id: str | None = None) -> NullRun:
        """A new untracked run; there is nothing to resume."""
        return NullRun()

    def params(self, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def metrics(self, values: Mapping[str, float], step: int, channel: str = "train") -> bool:
        """See :class:`Run`."""
        if (channel, step) in self._records:
            return False
        numbers = {name: float(value) for name, value in values.items()}
        self._records[channel, step] = {
            "step": step,
            "time_ms": time.time_ns() // 1_000_000,
            "channel": channel,
            "metrics": numbers,
        }
        return True

    def file(self, path: Path, folder: str | None = None) -> None:
        """Does nothing."""

    def finish(self, status: Status) -> None:
        """Does nothing."""

    def history(self, channel: str = "train") -> list[Record]:
        """See :class:`Run`."""
        return [record for (name, _), record in self._records.items() if name == channel]

    def mlflow_run_id(self, timeout: float = 0.0) -> str | None:
        """Always None."""
        return None


class Tracking:
    """A pipeline's tracking: the spool in `folder` and the thread that brings it to MLflow.

    Making one starts that thread, so MLflow's import and schema building (seconds) overlap with other work.
    The folder belongs to one pipeline and one driver at a time. As a context manager it closes itself.

    Args:
        uri: MLflow's address.
        experiment: MLflow's experiment; made if there is none.
        folder: of the spool.
        files: where the files of a new experiment go, such as `s3://bucket/folder`; default: see
            :func:`~orchestrator.tracking.connect.ensure_experiment`.
        artifacts: the folder of the store's artifacts on this machine, below which the files of models are.

    Raises:
        UserError: the address is of an unknown kind.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        folder: Path,
        files: str | None = None,
        artifacts: Path | None = None,
    ) -> None:
        self.uri = absolute_uri(uri)
        self._spool = Spool(folder)
        self._flusher = Flusher(self._spool, MlflowWriter(self.uri, experiment, files, artifacts))
        self._flusher.start()

    def kept_by(self, keep: Callable[[], bool]) -> None:
        """Have `keep` copy the records to where they outlive this machine, whenever a run is to be secured."""
        self._spool.keep = keep

    def run(self, name: str, resume_id: str | None = None) -> SpooledRun:
        """A run at the top; with `resume_id` that very run, RUNNING again."""
        return open_run(self._spool, self.uri, name, resume_id, parent=None)

    def drain(self, timeout: float, watch: Callable[[], bool] = lambda: True) -> bool:
        """Waits until MLflow has everything; True if it does. See :meth:`Flusher.drain`."""
        return self._flusher.drain(timeout, watch)

    def close(self, timeout: float = PATIENCE_S, watch: Callable[[], bool] = lambda: True) -> bool:
        """Drains and stops. What could not be sent stays in the spool and goes out next time."""
        done = self._flusher.drain(timeout, watch)
        self._flusher.stop()
        return done

    @property
    def counts(self) -> Counts:
        """What became of the records that were sent."""
        return self._flusher.counts

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_run(spool: Spool, uri: str, name: str, resume_id: str | None, parent: str | None) -> SpooledRun:
    """A run of `spool`, new or resumed."""
    run_id = resume_id or uuid.uuid4().hex
    run = SpooledRun(spool, run_id, uri)
    with spool.losses_logged():
        spool.post(run_id, "open", name=name, parent=parent)
    return run


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names to texts. Lists and the like become JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{full}.")
        elif isinstance(value, (list, tuple)):
            flat[clean_name(full)] = json.dumps(value, default=str)
        else:
            flat[clean_name(full)] = str(value)
    return flat
