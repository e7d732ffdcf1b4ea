"""Connecting to MLflow without its noise, its global state, or folders in odd places. Imports it lazily."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UserError
from orchestrator.fsio import folder_beside, link, move
from orchestrator.tracking import relocate

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_ENVIRONMENT = {
    # Training machines often have no way out, and what a user trains is nobody's business.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # At the end of each run, in the middle of what a pipeline says.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow would try for minutes before it says that a server is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    # A server that is asked too often may say "in an hour", and MLflow would wait in silence; the flusher waits itself.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}


def absolute_uri(uri: str) -> str:
    """`uri` with a relative SQLite path made absolute, so that it means the same from any folder.

    Raises:
        UserError: the scheme is none of sqlite, http(s), postgresql, mysql, mssql.
    """
    if uri.startswith(_SQLITE):
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).expanduser().absolute())
    scheme = uri.partition("://")[0].partition("+")[0]
    if scheme not in ("http", "https", "postgresql", "mysql", "mssql"):
        raise UserError(
            f"cannot track to {uri!r}",
            where="tracking.uri",
            hint="use sqlite:///folder/mlflow.db or the http(s):// address of an MLflow server",
        )
    return uri


def database_path(uri: str) -> Path | None:
    """The SQLite file behind `uri`, or None if it is something else."""
    absolute = absolute_uri(uri)
    return Path(absolute.removeprefix(_SQLITE)) if absolute.startswith(_SQLITE) else None


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and registry at `uri`; makes a SQLite database that is missing.

    One that was moved with its store is mended first, see :mod:`orchestrator.tracking.relocate`.

    The first connection of a process imports MLflow (2 s), the first to a new SQLite file builds its schema
    (4 s): call it from a background thread where one waits. A server that does not answer may block it for
    minutes.
    """
    load_mlflow()
    from mlflow import MlflowClient

    database = database_path(uri)
    if database is not None and not database.exists():
        _create_database(database)
    elif database is not None:
        relocate.mend_local(database, database.parent / relocate.FOLDER)
    absolute = absolute_uri(uri)
    return MlflowClient(tracking_uri=absolute, registry_uri=absolute)


def load_mlflow() -> None:
    """Imports MLflow, if that was not done yet, with this project's settings and without its noise."""
    for name, value in _environment().items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    # MLflow sets its own level on import, and schema building alone logs a hundred lines. urllib3 warns of
    # every single retry; the flusher warns once.
    for logger, level in (
        ("mlflow", logging.WARNING),
        ("alembic", logging.WARNING),
        ("urllib3", logging.ERROR),
        # The whole traceback of whatever a database says, which comes to us as an error besides.
        ("mlflow.store", logging.CRITICAL),
    ):
        logging.getLogger(logger).setLevel(level)


def _environment() -> dict[str, str]:
    """MLflow has its own name for the S3 endpoint, and asks for checksums that many servers do not know."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return _ENVIRONMENT
    s3 = {"MLFLOW_S3_ENDPOINT_URL": endpoint, "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
    return _ENVIRONMENT | s3


def _create_database(path: Path) -> None:
    """Builds the schema aside and then gives it its name: MLflow cannot mend one that was half built."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(path) as folder:
        new = folder / path.name
        store = SqlAlchemyStore(_SQLITE + str(new), _artifacts(path))
        store.engine.dispose()
        # Unlike a rename, a link fails if another process has made the database in between. Some file systems have
        # no links.
        if not link(new, path) and not path.exists():
            move(new, path)


def _artifacts(database: Path) -> str:
    return (database.parent / relocate.FOLDER).as_uri()


# What MLflow's pages call an experiment that trains models; without it they guess.
_TRAINING = {"mlflow.experimentKind": "custom_model_development"}


def ensure_experiment(client: MlflowClient, uri: str, name: str, files: str | None = None) -> str:
    """The id of the experiment `name`, made if there is none.

    With SQLite its artifacts go to `files`, by default to `mlartifacts` beside the database: MLflow's own
    default is `mlruns` in whatever folder the process was started from. A server knows its own place.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = database_path(uri)
        location = (files or _artifacts(database)) if database else None
        try:
            return usable_id(
                client.create_experiment(name, artifact_location=location, tags=_TRAINING), "experiment"
            )
        except MlflowException:
            # Somebody else may have made it in between.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return usable_id(found.experiment_id, "experiment")


def usable_id(value: object, of: str) -> str:
    """An id out of an answer.

    Raises:
        ConnectionError: there is none: who answers is not an MLflow server, or not a whole one.
    """
    if not isinstance(value, str) or not value:
        raise ConnectionError(f"the answer has no id of the {of}")
    return value
