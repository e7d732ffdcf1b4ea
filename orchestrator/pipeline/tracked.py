"""The pipeline's tracking run, and what earlier drivers could not send."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.workspace import Workspace
from orchestrator.tracking import moved
from orchestrator.tracking.connect import database_path
from orchestrator.tracking.flush import Flusher
from orchestrator.tracking.runs import Run, Tracking
from orchestrator.tracking.sink import MlflowSink
from orchestrator.tracking.spool import Spool


@contextlib.contextmanager
def open_tracking(loaded: LoadedPipeline, workspace: Workspace, run_id: str) -> Iterator[Run]:
    """The pipeline's run, new or resumed; what is in the spool is sent before this returns, or next time.

    Raises:
        UserError: the tracking address is of an unknown kind.
    """
    _mend_places(loaded, workspace)
    mirror = workspace.mirror(loaded.name)
    with _mirrored(loaded, workspace), _tracking(loaded, workspace) as tracking:
        if mirror is not None:
            tracking.kept_by(mirror.flush)
        yield tracking.run(loaded.name, resume_id=run_id)


def send_leftovers(loaded: LoadedPipeline, workspace: Workspace) -> None:
    """Send what a dead driver left in the spool, if anything; MLflow is imported only then."""
    _mend_places(loaded, workspace)
    with _mirrored(loaded, workspace):
        folder = workspace.spool(loaded.name)
        if not folder.is_dir():
            return
        tracking = loaded.spec.tracking
        sink = MlflowSink(tracking.uri, tracking.experiment or loaded.name)
        if Flusher(Spool(folder), sink).pending():
            _tracking(loaded, workspace).close()


def _mend_places(loaded: LoadedPipeline, workspace: Workspace) -> None:
    """Where the store is a copy in another bucket, have MLflow's database say so."""
    database, files = database_path(loaded.spec.tracking.uri), workspace.tracked_files
    if database is not None and files is not None:
        experiment = loaded.spec.tracking.experiment or loaded.name
        moved.mend_remote(database, experiment, files, workspace.has_tracked_files)


def _mirrored(loaded: LoadedPipeline, workspace: Workspace) -> contextlib.AbstractContextManager[None]:
    mirror = workspace.mirror(loaded.name)
    return contextlib.nullcontext() if mirror is None else mirror.running()


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
