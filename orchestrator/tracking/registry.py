"""Finished models in MLflow's registry: safetensors and JSON in, the same files out. Nothing is pickled."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import disk
from orchestrator.errors import UserError, first_line, shortened
from orchestrator.fsio import DIGESTS, move, why
from orchestrator.redact import redacted
from orchestrator.tracking import aliases, relocate
from orchestrator.tracking.aliases import OPEN, Gate
from orchestrator.tracking.answers import answering, require_database, understood
from orchestrator.tracking.backlog import clock
from orchestrator.tracking.connect import absolute_uri, connect, database_path
from orchestrator.tracking.mlflow_writer import model_name
from orchestrator.tracking.outage import silent
from orchestrator.tracking.patience import interruptibly
from orchestrator.tracking.references import resolve
from orchestrator.tracking.run import Run
from orchestrator.tracking.spool import now_ms

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CONTENT_TAG = "orchestrator.sha256"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIXES = (".safetensors", ".json", ".md", ".png")
# MLflow reads it and finds there how to load the model.
_MLMODEL = "MLmodel"


@dataclass(frozen=True)
class Facts:
    """What a LoggedModel shows of a model: its kind, parameters, and figures after an optimiser step."""

    kind: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class Pulled:
    """A version that was pulled.

    Attributes:
        name: of the registered model.
        version: its number.
        alias: by which it was found; None if it was asked for by number, or is the newest.
        folder: that has it now.
    """

    name: str
    version: int
    alias: str | None
    folder: Path

    def __str__(self) -> str:
        return f"{self.name} version {self.version}" + (f" (@{self.alias})" if self.alias else "")


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
    _require_model(folder)
    contents = _contents(folder)
    _require_trained(name, contents, digests or {})
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
        raise UserError(
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
            client.set_registered_model_tag(name, key, value)
        # The alias comes last: a version that has none was not published to the end, and the next run finds it.
        decision = aliases.decide(client, name, alias, version, gate)
        aliases.carry_out(client, name, alias, decision, gate.marks)
        gate.told(decision)
    except Exception as error:
        held = _has_alias(client, name, version) if known is None else None
        if held is False:
            # Not where there is no telling: an alias that did move here would go with the version.
            with contextlib.suppress(Exception):
                client.delete_model_version(name, str(version))
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


def pull(reference: str, out: Path, uri: str, store: str | None = None) -> Path:
    """The folder of :func:`fetch`; takes and raises what that does."""
    return fetch(reference, out, uri, store).folder


def fetch(reference: str, out: Path, uri: str, store: str | None = None) -> Pulled:
    """Downloads a model into the folder `out`, which appears only when complete.

    Args:
        reference: `name@alias`, `name:version` (or `name/version`), or a bare `name`: its @champion if it has one, else
            its newest version.
        out: must not exist, or be empty.
        uri: of MLflow.
        store: the address of the store that has the files now, if it is not the one that MLflow knows.

    Raises:
        UserError: no such model, alias or version; `out` is not empty; MLflow or the files cannot be reached;
            the files are not those that were trained and published.
    """
    out = free(out)
    client = _client_of(uri)
    from mlflow.artifacts import download_artifacts

    out = out.absolute()
    with disk.making(out) as staging:
        try:

            def download() -> tuple[ModelVersion, str | None, str, Path]:
                version, alias = resolve(client, reference)
                source = client.get_model_version_download_uri(version.name, version.version)
                if version.status != "READY" or not isinstance(source, str) or "/" not in source:
                    # MLflow would take an empty address for the folder that this process was started in.
                    raise UserError(
                        f"{reference} is version {version.version} of {version.name}, which was not finished "
                        f"(status {shortened(str(version.status), 40)}, files at {shortened(repr(source), 100)})",
                        where=reference,
                        hint="publish it again: orchestrator publish FILE",
                    )
                if store is not None:
                    source = relocate.rebased(source, f"{_address(store)}/{relocate.FOLDER}")
                # By the files' own address: models:/ addresses make MLflow look into the process-wide registry.
                path = download_artifacts(source, dst_path=str(staging), tracking_uri=absolute_uri(uri))
                return version, alias, source, Path(path)

            version, alias, source, folder = interruptibly(download, uri, None, f"pulling {reference}")
            _require_plain(folder, staging, reference)
            if version.tags.get(CONTENT_TAG, "") != content_digest(_contents(folder)):
                raise UserError(f"the files of {reference} are not those that were published", where=source)
            # What was written by safetensors only its owner may read, and copies are like it.
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            move(folder, out)
        except UserError:
            raise
        except Exception as error:  # of MLflow, of the database under it, or of the store of the files
            reason = shortened(str(error).replace(uri, redacted(uri)), 300)
            raise UserError(
                f"cannot pull {reference} from {redacted(uri)}: {reason}",
                where=uri,
                hint="check that MLflow and the place of its files answer, then pull again",
            ) from error
    return Pulled(version.name, int(version.version), alias, out)


def free(out: Path) -> Path:
    """The path of a folder to be made, with `~` replaced.

    Raises:
        UserError: something is there, or no folder can have the name.
    """
    out = disk.named(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty", where=str(out), hint="name a folder that does not exist yet")
    return out


@dataclass(frozen=True)
class Version:
    """A version of a registered model: its name, its number, and the digest of its files ("" if it has none)."""

    name: str
    number: str
    content: str


def version_of(reference: str, uri: str) -> Version:
    """The version that a reference means now. Fetches none of its files.

    Args:
        reference: the model, see :func:`orchestrator.tracking.references.resolve`.
        uri: of MLflow.

    Raises:
        UserError: no such model, alias or version; or MLflow cannot be reached.
    """
    client = _client_of(uri)
    with answering(uri, where=uri):
        found, _ = interruptibly(lambda: resolve(client, reference), uri, None, f"looking up {reference}")
    return Version(found.name, str(found.version), found.tags.get(CONTENT_TAG, ""))


def cached(reference: str, uri: str, cache: Path) -> tuple[Version, Path]:
    """A registered model out of a folder of models by their content; pulled first if it is not there whole.

    An alias is asked for each time. A folder never changes.

    Raises:
        UserError: as :func:`pull`; or the cache cannot be written.
    """
    version = version_of(reference, uri)
    if not _DIGEST.fullmatch(version.content):
        raise UserError(
            f"{reference} was published without the sha256 of its files",
            where=reference,
            hint="publish it again",
        )
    folder = cache / version.content
    if _is_whole(folder, version.content):
        return version, folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"the cache cannot be written: {why(error)}",
            where=str(folder),
            hint="name another folder in the environment variable ORCHESTRATOR_CACHE",
        ) from error
    try:
        pull(f"{version.name}/{version.number}", folder, uri)
    except UserError:
        # Another process may have fetched the same in the meantime.
        if not _is_whole(folder, version.content):
            raise
    return version, folder


def _is_whole(folder: Path, content: str) -> bool:
    try:
        return folder.is_dir() and content_digest(_contents(folder)) == content
    except OSError:
        return False


def _client_of(uri: str) -> MlflowClient:
    """A client of a registry that is there. Raises UserError."""
    require_database(uri)
    with answering(uri, where=uri):
        return connect(uri)


def content_digest(files: Mapping[str, str]) -> str:
    """One sha256 over the names and the sha256 of files."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items(), key=lambda item: Path(item[0])):
        digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()


def _address(store: str) -> str:
    return store.rstrip("/") if "://" in store else Path(store).expanduser().absolute().as_uri()


def _contents(folder: Path) -> dict[str, str]:
    """The sha256 of all files of `folder`, by name."""
    return {path.relative_to(folder).as_posix(): DIGESTS.of(path) for path in _files(folder)}


def _require_trained(name: str, contents: Mapping[str, str], digests: Mapping[str, str]) -> None:
    wrong = sorted(file for file, digest in digests.items() if contents.get(file) != digest)
    if wrong:
        raise UserError(
            f"cannot publish {name}: {wrong[0]} is not the file that was trained, its sha256 differs",
            hint="run the pipeline again: damaged artifacts are made again",
        )


def _require_plain(folder: Path, staging: Path, reference: str) -> None:
    """See that what came is in `staging`, and plain files of a model: the server chooses their names."""
    strange = [
        path for path in folder.rglob("*") if path.is_symlink() or not (path.is_dir() or path.is_file())
    ]
    strange += _no_model_files(folder)
    if not folder.resolve().is_relative_to(staging.resolve()) or strange:
        what = strange[0].relative_to(folder) if strange else folder
        raise UserError(f"{reference} contains more than the files of a model: {what}", where=reference)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _no_model_files(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if path.suffix not in _SUFFIXES and path != folder / _MLMODEL]


def _require_model(folder: Path) -> None:
    files = _files(folder)
    if strange := _no_model_files(folder):
        raise ValueError(f"a published model may only contain {', '.join(_SUFFIXES)} files, not {strange[0]}")
    if folder / "config.json" not in files or not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"{folder} does not contain a model: config.json and a safetensors file are needed")


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
