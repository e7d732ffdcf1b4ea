"""The pipeline's tracking run, and what MLflow did not take yet: sent when a run ends, or by `orchestrator sync`."""

from __future__ import annotations

import contextlib
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.config.private_values import without_secrets
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.redact import redacted
from orchestrator.shell_command import command, neighbour
from orchestrator.tracking import relocate
from orchestrator.tracking.backlog import Backlog, Outage, backlog, clock, counted, noted_outage, pending
from orchestrator.tracking.connect import database_path
from orchestrator.tracking.flusher import Counts
from orchestrator.tracking.run import PATIENCE_S, Run, Tracking
from orchestrator.tracking.spool import Spool

Say = Callable[[str], None]
# The end of a run that takes longer than that is explained, and again after so long.
_FIRST_S, _AGAIN_S = 5.0, 15.0


@dataclass(frozen=True)
class Waiting:
    """What MLflow has not taken yet, why, and what sends it.

    Attributes:
        outage: why, if that is known.
        where: the server or database.
        command: which sends it.
    """

    backlog: Backlog
    outage: Outage | None
    where: str
    command: str

    def __str__(self) -> str:
        number, runs = self.backlog.records, self.backlog.runs
        verb, them = ("waits", "it") if number == 1 else ("wait", "them")
        of = f" of {runs} runs" if runs > 1 else ""
        text = f"{counted(number)}{of} {verb} for {self.where} since {clock(self.backlog.since)}"
        if self.outage is not None:
            text += f"; {self.outage.trouble.what} since {clock(self.outage.since)}"
        return f"{text}; the next run sends {them}, and so does `{self.command}`"


@contextlib.contextmanager
def open_tracking(
    loaded: LoadedPipeline,
    workspace: Workspace,
    run_id: str,
    *,
    say: Say = lambda text: None,
    stop: threading.Event | None = None,
) -> Iterator[Run]:
    """The pipeline's run, new or resumed; what is in the spool is sent before this returns, or next time.

    Args:
        say: is told when the end takes long.
        stop: once it is set, nobody waits for MLflow any more at the end; one that was set before does not count.

    Raises:
        UserError: the tracking address is of an unknown kind.
    """
    _relocate(loaded, workspace)
    spool_backup = workspace.spool_backup(loaded.name)
    with _backed_up(loaded, workspace):
        tracking = _tracking(loaded, workspace)
        try:
            if spool_backup is not None:
                tracking.kept_by(spool_backup.flush)
            yield tracking.run(loaded.name, resume_id=run_id)
        finally:
            tracking.close(watch=_DrainProgress(loaded, workspace, say, stop))


def send(
    loaded: LoadedPipeline,
    workspace: Workspace,
    watch: Callable[[], bool] = lambda: True,
    patience: float = PATIENCE_S,
    begin: Callable[[], None] = lambda: None,
) -> tuple[Counts, Waiting | None]:
    """Send what earlier drivers left in the spool, if anything; MLflow is imported only then.

    Args:
        watch: called all the while; False ends the waiting.
        patience: seconds without an answer after which it gives up.
        begin: called before anything is sent, with everything that waits on this machine; not if nothing does.

    Returns:
        What became of the records, and what still waits; None if nothing does.
    """
    counts = Counts()
    _relocate(loaded, workspace)
    with _backed_up(loaded, workspace):
        if workspace.spool(loaded.name).is_dir() and pending(_spool(loaded, workspace)):
            begin()
            tracking = _tracking(loaded, workspace)
            tracking.close(patience, watch)
            counts = tracking.counts
    return counts, waiting(loaded, workspace)


def send_leftovers(loaded: LoadedPipeline, workspace: Workspace, say: Say = lambda text: None) -> None:
    """As :func:`send`, telling `say` when it takes long."""
    send(loaded, workspace, _DrainProgress(loaded, workspace, say, None))


def waiting(loaded: LoadedPipeline, workspace: Workspace) -> Waiting | None:
    """What MLflow has not taken yet, as far as this machine knows; None if nothing waits."""
    if not workspace.spool(loaded.name).is_dir():
        return None
    spool = _spool(loaded, workspace)
    found = backlog(spool)
    if found is None:
        return None
    return Waiting(found, noted_outage(spool), where(loaded), sync_command(loaded))


def sync_command(loaded: LoadedPipeline) -> str:
    """What sends what waits: the same file and overrides."""
    overrides = dict.fromkeys(loaded.document.overrides.values())
    return command("sync", str(loaded.path), *map(without_secrets, overrides))


def where(loaded: LoadedPipeline) -> str:
    """The server or database that the pipeline is tracked in."""
    uri = loaded.spec.tracking.uri
    database = database_path(uri)
    return f"MLflow at {redacted(uri)}" if database is None else f"the tracking database {database}"


def ui_address(loaded: LoadedPipeline) -> str:
    """The address of the pages that show the pipeline's runs, or the command that serves them."""
    uri = loaded.spec.tracking.uri
    if uri.startswith(("http://", "https://")):
        return redacted(uri)
    return shlex.join([neighbour("mlflow"), "ui", "--backend-store-uri", redacted(uri)])


def pull_command(loaded: LoadedPipeline, reference: str) -> str:
    """What fetches a model of the registry into a folder of its name."""
    folder = reference.partition("@")[0].removeprefix(f"{loaded.name}-")
    uri = loaded.spec.tracking.uri
    place = () if uri == type(loaded.spec.tracking)().uri else ("--tracking", redacted(uri))
    return command("pull", reference, "--out", folder, *place)


class _DrainProgress:
    """Says what is waited for when that takes long; the user may end it.

    Args:
        stop: ends the waiting when it is set meanwhile.
    """

    def __init__(
        self, loaded: LoadedPipeline, workspace: Workspace, say: Say, stop: threading.Event | None
    ) -> None:
        self._loaded, self._workspace, self._say, self._stop = loaded, workspace, say, stop
        self._begun = 0.0
        self._next = 0.0
        self._may_end = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._begun:
            self._begun, self._next = now, now + _FIRST_S
            self._may_end = self._stop is not None and not self._stop.is_set()
        if now >= self._next:
            self._next = now + _AGAIN_S
            if found := backlog(_spool(self._loaded, self._workspace)):
                self._print(found, now - self._begun)
        return not (self._may_end and self._stop is not None and self._stop.is_set())

    def _print(self, found: Backlog, seconds: float) -> None:
        end = " Ctrl-C stops it and keeps the records." if self._may_end else ""
        database = database_path(self._loaded.spec.tracking.uri)
        if database is not None and not database.exists():
            self._say(
                f"The tracking database {database} is being created, for {seconds:.0f} s so far: "
                f"{counted(found.records)} are sent to it then.{end}"
            )
            return
        self._say(
            f"Still sending after {seconds:.0f} s: {counted(found.records)} to {where(self._loaded)}. This ends when "
            f"all are accepted, or when none was for {PATIENCE_S:.0f} s.{end}"
        )


def _spool(loaded: LoadedPipeline, workspace: Workspace) -> Spool:
    return Spool(workspace.spool(loaded.name))


def _relocate(loaded: LoadedPipeline, workspace: Workspace) -> None:
    """Where the store is a copy in another bucket, have MLflow's database say so."""
    database, files = database_path(loaded.spec.tracking.uri), workspace.tracked_files
    if database is not None and files is not None:
        experiment = loaded.spec.tracking.experiment or loaded.name
        relocate.mend_remote(database, experiment, files, workspace.has_tracked_files)


def _backed_up(loaded: LoadedPipeline, workspace: Workspace) -> contextlib.AbstractContextManager[None]:
    spool_backup = workspace.spool_backup(loaded.name)
    return contextlib.nullcontext() if spool_backup is None else spool_backup.running()


def _tracking(loaded: LoadedPipeline, workspace: Workspace) -> Tracking:
    tracking = loaded.spec.tracking
    experiment = tracking.experiment or loaded.name
    return Tracking(
        tracking.uri,
        experiment,
        workspace.spool(loaded.name),
        workspace.tracked_files,
        workspace.artifacts_folder,
    )
