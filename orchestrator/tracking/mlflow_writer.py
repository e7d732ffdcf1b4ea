"""Writes spooled records to MLflow. Doing so twice leaves what doing so once leaves."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.names import BadNameError, inside, parts_of
from orchestrator.tracking.connect import connect, database_path, ensure_experiment, load_mlflow, usable_id
from orchestrator.tracking.spool import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "orchestrator.run_id"
MODEL_TAG = "orchestrator.model_of"
MAX_METRICS = 1000
_MAX_PARAMS = 100
_MAX_VALUE = 5000
_MAX_DATASET_NAME = 500
_MAX_DIGEST = 36
_NOT_IN_A_MODEL = re.compile(r"""[/:.%"']""")
# The last two: servers of earlier versions know no logged models.
_REFUSED = (
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "ENDPOINT_NOT_FOUND",
    "NOT_IMPLEMENTED",
)
_BAD_VALUE = (OverflowError, TypeError, ValueError)
_log = logging.getLogger(__name__)


class RunGoneError(Exception):
    """The MLflow run is not in the database any more (another database, or one that was made anew)."""


class RejectedError(Exception):
    """MLflow will never take this record."""


class UnusableRecordError(RejectedError):
    """A record that is not sent: what it says cannot be right, or its files are not where it may take them from."""


class UnknownRecordError(RejectedError):
    """A record of a kind that a later version writes."""


class MlflowWriter:
    """One experiment of one MLflow server. Connects on first use; not for several threads.

    Args:
        uri: MLflow's address.
        experiment: made if there is none.
        files: where the files of a new experiment go, see `ensure_experiment`.
        artifacts: the folder of the store's artifacts on this machine. A model's files are taken from below it only;
            None: from nowhere.
    """

    def __init__(
        self, uri: str, experiment: str, files: str | None = None, artifacts: Path | None = None
    ) -> None:
        self.uri = uri
        self.experiment = experiment
        self._files = files
        self._artifacts = artifacts
        self._connection: tuple[MlflowClient, str] | None = None

    def prepare(self) -> None:
        """Imports MLflow, which takes seconds. Asks the server nothing."""
        load_mlflow()

    @property
    def makes_database(self) -> bool:
        """Whether the first use will make a SQLite database, which takes seconds too."""
        path = database_path(self.uri)
        return path is not None and not path.exists()

    def upload_size(self, record: Record, files: Path) -> int:
        """Bytes of the files that sending a record uploads. `files` holds the copies of files to upload."""
        try:
            if record["op"] == "file":
                return _copy_of(record, files)[0].stat().st_size
            if record["op"] == "model" and (folder := _model_folder(record, self._artifacts)) is not None:
                return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        except (OSError, RejectedError):  # sending it says so
            pass
        return 0

    def open(self, run_id: str, record: Record, known: str | None, parent: str | None) -> str:
        """Creates the MLflow run of our `run_id`, or sets it back to RUNNING if there is one. Returns its id.

        Args:
            run_id: our id; kept as a tag, by which the run is found again if we crashed before noting its id.
            record: the `open` record: name, tags, time_ms.
            known: the MLflow id as far as known.
            parent: the MLflow id of the run to nest under.
        """
        client, experiment_id = self._connected()
        with _Translated():
            mlflow_id = known or self._search(run_id)
            if mlflow_id is not None:
                client.update_run(mlflow_id, status="RUNNING")
                return mlflow_id
            tags = {**_texts(record.get("tags") or {}), RUN_TAG: run_id}
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            run = client.create_run(
                experiment_id, start_time=record["time_ms"], tags=tags, run_name=record["name"]
            )
            return usable_id(run.info.run_id, "run")

    def metrics(self, mlflow_id: str, records: Sequence[Record]) -> None:
        """Logs `channel/name` for the metrics of all records.

        MLflow's primary key is (run, name, time, step, value): a row that is already there is left alone.
        """
        from mlflow.entities import Metric

        client, _ = self._connected()
        metrics = [
            Metric(f"{record['channel']}/{name}", value, record["time_ms"], record["step"])
            for record in records
            for name, value in record["metrics"].items()
        ]
        with _Translated():
            for start in range(0, len(metrics), MAX_METRICS):
                client.log_batch(mlflow_id, metrics=metrics[start : start + MAX_METRICS])

    def apply(self, mlflow_id: str, record: Record, files: Path) -> None:
        """Does a record of any other kind. `files` holds the copies of files to upload."""
        client, _ = self._connected()
        with _Translated():
            match record["op"]:
                case "params":
                    self._params(client, mlflow_id, _texts(record["params"]))
                case "tags":
                    self._tags(client, mlflow_id, _texts(record["tags"]))
                case "finish" if record["status"] not in ("FINISHED", "FAILED", "KILLED"):
                    raise UnusableRecordError(f"unknown status: {record['status']!r:.40}")
                case "finish":
                    client.set_terminated(mlflow_id, record["status"], end_time=record["time_ms"])
                case "file":
                    source, folder = _copy_of(record, files)
                    # Missing means uploaded: copies are removed only after that.
                    if source.exists():
                        client.log_artifact(mlflow_id, str(source), folder)
                case "datasets":
                    self._datasets(client, mlflow_id, record)
                case "model":
                    self._model(client, mlflow_id, record)
                case op:
                    raise UnknownRecordError(f"this version does not know records of kind {op!r:.40}")

    def _params(self, client: MlflowClient, mlflow_id: str, params: dict[str, str]) -> None:
        """Params never change in MLflow: those that are new are logged, the changed ones become tags."""
        from mlflow.entities import Param

        existing = client.get_run(mlflow_id).data.params
        new = [Param(name, value) for name, value in params.items() if name not in existing]
        for start in range(0, len(new), _MAX_PARAMS):
            client.log_batch(mlflow_id, params=new[start : start + _MAX_PARAMS])
        changed = {name: value for name, value in params.items() if existing.get(name, value) != value}
        self._tags(client, mlflow_id, {f"drift.{name}": value for name, value in changed.items()})

    def _tags(self, client: MlflowClient, mlflow_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(name, value) for name, value in tags.items()]
        for start in range(0, len(rows), _MAX_PARAMS):
            client.log_batch(mlflow_id, tags=rows[start : start + _MAX_PARAMS])

    def _datasets(self, client: MlflowClient, mlflow_id: str, record: Record) -> None:
        """MLflow knows an input by name and digest: one that is there is left alone."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        found = []
        for one in record["datasets"]:
            scheme = one["uri"].partition("://")[0] if "://" in one["uri"] else "local"
            dataset = Dataset(
                name=one["name"][:_MAX_DATASET_NAME],
                digest=one["digest"][:_MAX_DIGEST],
                source_type="local" if scheme == "file" else scheme,
                source=json.dumps({"uri": one["uri"]}),
                profile=json.dumps(one["profile"]),
            )
            tags = [InputTag("mlflow.data.context", one["used_for"]), InputTag("digest", one["digest"])]
            found.append(DatasetInput(dataset, tags))
        client.log_inputs(mlflow_id, datasets=found)

    def _model(self, client: MlflowClient, mlflow_id: str, record: Record) -> None:
        """A LoggedModel with its files, figures and place in the run. What an earlier try did is found by a tag."""
        from mlflow.entities import LoggedModelOutput, Metric

        _, experiment_id = self._connected()
        folder = _model_folder(record, self._artifacts)
        _check_texts(record)
        mark = f"{mlflow_id}-{record['name']}"
        found = client.search_logged_models([experiment_id], f"tags.`{MODEL_TAG}` = '{mark}'", max_results=1)
        if found:
            model = found[0]
        else:
            model = client.create_logged_model(
                experiment_id,
                name=model_name(record["name"]),
                source_run_id=mlflow_id,
                tags={**_texts(record["tags"]), MODEL_TAG: mark},
                params=_texts(record["params"]),
                model_type=record["kind"],
            )
        if str(model.status) != "READY":
            self._upload(client, model.model_id, record, folder)
            client.finalize_logged_model(model.model_id, "READY")
        # Under a name of their own: the run has the figures of its stage already. A driver that concludes a stage
        # again, since the last one died doing so, says the same at another time.
        known = {(metric.key, metric.step) for metric in model.metrics or []}
        metrics = [
            Metric(f"model/{name}", value, record["time_ms"], record["step"], model_id=model.model_id)
            for name, value in record["metrics"].items()
            if (f"model/{name}", record["step"]) not in known
        ]
        if metrics:
            client.log_batch(mlflow_id, metrics=metrics)
        outputs = client.get_run(mlflow_id).outputs
        if model.model_id not in [one.model_id for one in (outputs.model_outputs if outputs else [])]:
            client.log_outputs(mlflow_id, [LoggedModelOutput(model.model_id, record["step"])])

    def _upload(self, client: MlflowClient, model_id: str, record: Record, folder: Path | None) -> None:
        if folder is not None:
            client.log_model_artifacts(model_id, str(folder))
        elif record.get("folder") is not None:
            # Its driver ran on another machine, or the store was cleared: the tags say where the files were.
            _log.warning("the files of model %s are not here any more: %s", record["name"], record["folder"])
        with tempfile.TemporaryDirectory() as texts:
            for name, text in record["texts"].items():
                inside(Path(texts), name).write_text(text, encoding="utf-8")
            if record["texts"]:
                client.log_model_artifacts(model_id, texts)

    def _search(self, run_id: str) -> str | None:
        client, experiment_id = self._connected()
        runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _connected(self) -> tuple[MlflowClient, str]:
        if self._connection is None:
            client = connect(self.uri)
            self._connection = client, ensure_experiment(client, self.uri, self.experiment, self._files)
        return self._connection

    def reconnect(self) -> None:
        """Forgets the connection: the next use makes a new one."""
        self._connection = None


def model_name(name: str) -> str:
    """`name` with what MLflow refuses in the names of logged models replaced by dashes."""
    return _NOT_IN_A_MODEL.sub("-", name)


def _copy_of(record: Record, files: Path) -> tuple[Path, str | None]:
    """The copy to upload and the folder it goes to; records may come out of a store that others can write to."""
    folder = record.get("folder")
    try:
        if folder is not None:
            parts_of(str(folder))
        return inside(files, f"{record['copy']}/{record['name']}"), folder
    except BadNameError as error:
        raise UnusableRecordError(str(error)) from error


def _model_folder(record: Record, artifacts: Path | None) -> Path | None:
    """The folder of a model's files, or None if none are here; see :func:`_copy_of`.

    A record names a folder below the store's artifacts. Those of earlier versions have its absolute path, of a store
    that may have been moved since: what follows `artifacts/` in it is looked for in this one.

    Raises:
        UnusableRecordError: it is not one of the store's artifacts.
    """
    if record.get("folder") is None:
        return None
    name = record["folder"]
    known = [] if artifacts is None else [f"{artifacts.absolute()}/{one}" for one in _below_artifacts(name)]
    places = (*known, name) if name.startswith("/") else known
    path = next((one for one in places if os.path.isdir(one)), None)  # noqa: PTH112 (Path.is_dir raises for names that are too long)
    if path is None:
        return None
    # With links resolved: `..` and links would lead out of a folder that only looks like one of the store's.
    folder = Path(path).resolve()
    if artifacts is None or not folder.is_relative_to(artifacts.resolve()):
        raise UnusableRecordError(f"the files of a model are not in the store's artifacts: {name!r:.80}")
    return folder


def _below_artifacts(name: str) -> Iterator[str]:
    """What of a folder's name may be its path below the store's artifacts."""
    if not name.startswith("/"):
        yield name
        return
    parts = name.split("/")
    # A folder above the store may have the same name.
    yield from ("/".join(parts[at + 1 :]) for at in range(len(parts) - 1) if parts[at] == "artifacts")


def _check_texts(record: Record) -> None:
    for name, text in record["texts"].items():
        try:
            parts = parts_of(name)
        except BadNameError as error:
            raise UnusableRecordError(str(error)) from error
        if len(parts) > 1 or not isinstance(text, str):
            raise UnusableRecordError(f"not the name or not the text of a file: {name!r:.80}")


class _Translated:
    """Turns MLflow's errors into `RunGoneError` and `RejectedError`; lets through what may pass with time."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RejectedError):  # our own word on it
            return
        code: Any = getattr(error, "error_code", None)
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise RunGoneError(str(error)) from error
        if code in _REFUSED:
            raise RejectedError(str(error)) from error
        # What a driver says to a value that no column takes, such as an integer of more than 64 bits; MLflow
        # wraps it in the error it uses for its own failures too.
        if isinstance(error, _BAD_VALUE) or (error and isinstance(error.__cause__, _BAD_VALUE)):
            raise RejectedError(str(error)) from error


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: str(value)[:_MAX_VALUE] for name, value in values.items()}
