"""Finished models into MLflow's registry: safetensors and JSON, nothing is pickled. `download` has the way out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UserError, first_line, shortened
from orchestrator.redact import redacted
from orchestrator.tracking import aliases
from orchestrator.tracking.aliases import OPEN, AliasedVersion, Gate
from orchestrator.tracking.answers import UnreachableError, answering, understood
from orchestrator.tracking.backlog import clock
from orchestrator.tracking.connect import connect, database_path
from orchestrator.tracking.mlflow_writer import model_name
from orchestrator.tracking.model_files import (
    CONTENT_TAG,
    content_digest,
    contents_of,
    require_model,
    require_trained,
)
from orchestrator.tracking.outage import silent
from orchestrator.tracking.patience import interruptibly
from orchestrator.tracking.run import Run
from orchestrator.tracking.spool import now_ms

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


@dataclass(frozen=True)
class Facts:
    """What a LoggedModel shows of a model: its kind, parameters, and figures after an optimizer step."""

    kind: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0


def difference(
    uri: str, name: str, content: str, tags: Mapping[str, str], alias: str, gate: Gate = OPEN
) -> str | None:
    """What `publish` would change in the registry at `uri`, on one line; None if it has all of it. Changes nothing.

    Args:
        content: `content_digest` of the files.
        gate: what stands before the alias.

    Raises:
        UserError: the registry cannot be reached, or is damaged.
    """
    database = database_path(uri)
    if database is not None and not database.exists():
        return f"{name} is not in the registry: there is no database at {database}"
    with answering(uri):
        client = connect(uri)
        known = client.search_registered_models(f"name = '{name}'")
        if not known:
            return f"{name} is not in the registry at {redacted(uri)}"
        version, is_newest = _existing(client, name, {**tags, CONTENT_TAG: content})
        if version is None:
            return f"{name} has no version with this content and lineage"
        decision = aliases.decide(client, name, alias, version, gate)
        gate.told(decision)
        if line := aliases.lacking(client, name, alias, decision):
            return line
    if is_newest and not tags.items() <= known[0].tags.items():
        return f"the tags of {name} differ from those of its version {version}"
    return None


def holder(uri: str, name: str, alias: str) -> AliasedVersion | None:
    """The version of a registered model that has an alias; None if there is none, nor a model of that name.

    Raises:
        UserError: the registry cannot be reached, or is damaged.
    """
    database = database_path(uri)
    if database is not None and not database.exists():
        return None
    with answering(uri):
        client = connect(uri)
        if not client.search_registered_models(f"name = '{name}'"):
            return None
        return aliases.holder(client, name, alias)


def publish(
    run: Run,
    name: str,
    folder: Path,
    tags: Mapping[str, str],
    alias: str,
    *,
    facts: Facts | None = None,
    digests: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    stop: threading.Event | None = None,
    gate: Gate = OPEN,
) -> int:
    """Registers the files of `folder` as a version of the model `name` and points `alias` at it, if the gate is open.

    Publishing the same files with the same tags again (after a crash, say) finds the version that is there.

    Args:
        run: the run that the version belongs to.
        folder: safetensors, JSON, Markdown and PNG files; at least `config.json` and one safetensors file.
        digests: the sha256 of files by name, as they were recorded when the model was trained. The version is
            marked with these, and `pull` compares with them.
        tags: lineage; set on the version, and on the registered model if that is its newest version: of two stages
            that publish under one name with an alias each, one has the say.
        facts: what the version's LoggedModel has besides.
        timeout: seconds to wait until MLflow knows the run.
        stop: set when the user asked for a clean stop.
        gate: what stands before the alias; by default nothing but that the version was not rolled back.

    Returns:
        The version number.

    Raises:
        UserError: tracking is off, MLflow cannot be reached, or a file is not the one that was trained.
        ValueError: the folder holds other files, or lacks the two.
        Stopped: `stop` was set; doing it again finds what is there.
    """
    require_model(folder)
    contents = contents_of(folder)
    require_trained(name, contents, digests or {})
    if run.tracking_uri is None:
        raise UserError(
            "cannot publish a model: tracking is off", hint="set `tracking.uri` in the pipeline file"
        )
    uri = run.tracking_uri
    what = f"publishing {name}"
    run_id = interruptibly(lambda: run.mlflow_run_id(timeout), uri, stop, what)
    if run_id is None:
        outage = run.outage()
        wrong = silent(uri, timeout) if outage is None else outage.trouble
        since = "" if outage is None else f" since {clock(outage.since)}"
        raise UnreachableError(
            f"cannot publish {name}: {wrong.what}{since}",
            where="tracking.uri",
            hint=f"{wrong.cure}; then run the pipeline again: it continues here",
        )
    found = run_id

    def register() -> int:
        with answering(uri), understood(uri):
            marked = {**tags, CONTENT_TAG: content_digest(contents | dict(digests or {}))}
            return _register(uri, found, name, folder, tags, marked, alias, facts or Facts(), gate)

    return interruptibly(register, uri, stop, what)


def _register(
    uri: str,
    run_id: str,
    name: str,
    folder: Path,
    tags: Mapping[str, str],
    marked: Mapping[str, str],
    alias: str,
    facts: Facts,
    gate: Gate,
) -> int:
    client = connect(uri)
    _ensure_model(client, name)
    known, is_newest = _existing(client, name, marked)
    marks = aliases.marked(gate.marks)
    version = _create(client, run_id, name, folder, {**marked, **marks}, facts) if known is None else known
    try:
        for key, value in tags.items() if is_newest or known is None else ():
            _despite_another(partial(client.set_registered_model_tag, name, key, value))
        # The alias comes last: a version that has none was not published to the end, and the next run finds it.
        decision = aliases.decide(client, name, alias, version, gate)
        _despite_another(partial(aliases.carry_out, client, name, alias, decision, gate.marks))
        gate.told(decision)
    except Exception as error:
        held = _has_alias(client, name, version) if known is None else None
        if held is False:
            # Not where there is no telling: an alias that did move here would go with the version.
            with contextlib.suppress(Exception):
                client.delete_model_version(name, str(version))
        if isinstance(error, UserError):  # the gate's own
            raise
        refused = getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"
        if not held:  # else only the reply was lost
            what = f"the registry did not take tags and alias {alias!r} of {name} version {version}"
            raise UserError(
                f"{what}: {shortened(redacted(first_line(error)), 200)}",
                where="alias" if refused else "tracking.uri",
                hint="use another alias"
                if refused
                else "check the MLflow server, then run the same command again",
            ) from error
    with contextlib.suppress(Exception):  # what stays is surplus, and the next run removes it
        _remove_twins(client, name, marked, run_id, version)
    return version


def _despite_another(put: Callable[[], object]) -> None:
    """Put tags or aliases, and do so once more where another program adds the same ones at the same moment.

    A database refuses one of the two. The next time they are there, and are replaced.
    """
    from mlflow.exceptions import MlflowException

    try:
        put()
    except MlflowException as error:
        # As SQLite and PostgreSQL, and as MySQL put it.
        if not any(word in str(error).lower() for word in ("unique constraint", "duplicate entry")):
            raise
        put()


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _existing(client: MlflowClient, name: str, tags: Mapping[str, str]) -> tuple[int | None, bool]:
    """The newest version that has these tags, or None, and whether it is the newest of all."""
    versions = {int(one.version): one for one in client.search_model_versions(f"name = '{name}'")}
    found = [
        number
        for number, one in versions.items()
        if one.status == "READY" and tags.items() <= one.tags.items()
    ]
    return (max(found), max(found) == max(versions)) if found else (None, False)


def _remove_twins(
    client: MlflowClient, name: str, tags: Mapping[str, str], run_id: str, version: int
) -> None:
    """Delete this run's other versions with these tags and no alias: a lost reply makes MLflow's client ask twice."""
    pointed_at = {int(number) for number in client.get_registered_model(name).aliases.values()}
    for one in client.search_model_versions(f"name = '{name}'"):
        is_twin = one.run_id == run_id and aliases.without_marks(one.tags) == dict(tags)
        if is_twin and int(one.version) not in {version, *pointed_at}:
            client.delete_model_version(name, one.version)


def _has_alias(client: MlflowClient, name: str, version: int) -> bool | None:
    """Whether an alias points at the version; None if MLflow does not say."""
    try:
        model = client.get_registered_model(name)
    except Exception:
        return None
    return version in {int(number) for number in model.aliases.values()}


def _create(
    client: MlflowClient, run_id: str, name: str, folder: Path, tags: Mapping[str, str], facts: Facts
) -> int:
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.get_run(run_id)
    model = _begun(client, run.info.experiment_id, name, tags)
    if model is None:
        model = client.create_logged_model(
            run.info.experiment_id,
            name=model_name(name),
            source_run_id=run_id,
            tags=dict(tags),
            params=dict(facts.params),
            model_type=facts.kind,
        )
    client.log_model_artifacts(model.model_id, str(folder))
    if str(model.status) != "READY":
        client.finalize_logged_model(model.model_id, "READY")
    known = {metric.key for metric in model.metrics or [] if metric.run_id == run_id}
    # With the model's name: several are published in one run.
    figures = [
        Metric(f"{model_name(name)}/{figure}", value, now_ms(), facts.step, model_id=model.model_id)
        for figure, value in facts.metrics.items()
        if f"{model_name(name)}/{figure}" not in known
    ]
    if figures:
        client.log_batch(run_id, metrics=figures)
    if model.model_id not in [one.model_id for one in (run.outputs.model_outputs if run.outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, facts.step)])
    # Not models:/<id>: the SQL registry would look that up in the process-wide tracking store, not in ours.
    version = client.create_model_version(
        name, model.artifact_location, run_id=run_id, tags=dict(tags), model_id=model.model_id
    )
    return int(version.version)


def _begun(
    client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]
) -> LoggedModel | None:
    """The logged model that an earlier try at the same version began, if any: with these tags, so of this content."""
    found = client.search_logged_models([experiment_id], f"tags.`{CONTENT_TAG}` = '{tags[CONTENT_TAG]}'")
    same = [one for one in found if one.name == model_name(name) and tags.items() <= one.tags.items()]
    return same[0] if same else None
