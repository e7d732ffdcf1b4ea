"""From a pipeline file to a checked, frozen spec; every mistake in it is one readable UserError.

Relative paths in the file (the store, datasets, a SQLite tracking URI) are relative to the directory in
which the command runs, not to the file, so that one file serves several checkouts.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator import installed
from orchestrator.config import private_values, yaml_source
from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Pipeline
from orchestrator.config.validation_errors import validation_errors
from orchestrator.data.sources.captions import captions_path
from orchestrator.errors import UserError, joined, nearest, shortened
from orchestrator.redact import redacted, redacted_values, secret_in
from orchestrator.stages.base import Stage
from orchestrator.storage.local import not_followed
from orchestrator.storage.open import folder_of, is_remote, open_store
from orchestrator.storage.store import SCRATCH
from orchestrator.tracking.connect import absolute_uri

logger = logging.getLogger("orchestrator")

# Folders of a store that a run writes to.
_STORE_FOLDERS = ("artifacts", "work", "ledger", "holds", "logs", "pipelines", "spool")
_OF_A_PIPELINE = ("ledger", "logs", "pipelines", "spool")
_NAME = re.compile(r"[a-z0-9][a-z0-9_\-]{0,99}")


@dataclass(frozen=True)
class LoadedPipeline:
    """A checked pipeline and the file it came from.

    Attributes:
        missing: errors about data that is not there, where it was read without needing them.
        mistakes: the other errors in a file that the schema takes, where they were to be gathered.
        imported: stages whose kind is an import path in the file, with the path.
    """

    spec: Pipeline[Stage]
    document: yaml_source.Document
    missing: tuple[UserError, ...] = ()
    mistakes: tuple[UserError, ...] = ()
    imported: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return self.spec.name

    @property
    def path(self) -> Path:
        """The pipeline file."""
        return self.document.path

    def kind_of(self, stage: str) -> str:
        """The kind of a stage, as the file says it."""
        return dict(self.imported).get(stage, self.spec.stages[stage].kind)

    def where(self, *path: str | int) -> str:
        """`file:line  key.path = value` for error messages."""
        return self.document.where(path)

    def resolved(self) -> str:
        """The whole pipeline as YAML with every default and override written out, and without secrets."""
        data = self.spec.model_dump(mode="json")
        for name, path in self.imported:
            data["stages"][name]["kind"] = path
        return redacted(yaml.safe_dump(redacted_values(data), sort_keys=False, allow_unicode=True))


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    needs_data: bool = True,
    gather: bool = False,
    stage_type: Any = None,
) -> LoadedPipeline:
    """Read and check a pipeline file.

    Args:
        path: the YAML file.
        overrides: `key.path=value`, applied before checking; values are YAML.
        needs_data: whether data that is not there is a mistake, or only noted in `missing`: what a pipeline will
            cost is asked on machines without its data.
        gather: whether mistakes that the schema does not see are noted in `missing` and `mistakes`, to be told with
            those that :mod:`orchestrator.pipeline.check.pipeline_check` finds, instead of raised.
        stage_type: the union of stage configs; default: every kind the package has. Kinds of users' packages that the
            file names come to it.

    Raises:
        UserError: anything wrong with the file, all errors in one.
    """
    try:
        return _load(Path(path), overrides, needs_data, gather, stage_type)
    except UserError:
        raise
    except Exception as error:
        # A value that no check expected, such as a path that the system refuses. The file is still the user's to mend.
        logger.debug("while %s was read", path, exc_info=True)
        what = f"the pipeline file cannot be used: {type(error).__name__}: {error}"
        raise UserError(shortened(what, 500), where=str(path)) from error


def _load(
    path: Path, overrides: Sequence[str], needs_data: bool, gather: bool, stage_type: Any
) -> LoadedPipeline:
    from orchestrator.stages.registry import file_of

    document = yaml_source.read(path, overrides)
    if secrets := list(_secrets(document, document.data, ())):
        raise joined(secrets)
    stages, imported = _with_own_kinds(document, _all_stages() if stage_type is None else stage_type)
    _rename_old_keys(document, stages)
    model = file_of(stages)
    try:
        spec = model.model_validate(document.data)
    except ValidationError as error:
        raise joined(validation_errors(error, document, model)) from None
    loaded = LoadedPipeline(spec, document, imported=imported)
    unreachable = _fetch_models(loaded)
    problems, missing = _check(loaded), [*unreachable, *_missing_data(loaded)]
    if not gather and (problems or (missing and needs_data)):
        raise joined([*missing, *problems])
    return replace(loaded, missing=tuple(missing), mistakes=tuple(problems))


def _secrets(document: yaml_source.Document, value: Any, path: yaml_source.KeyPath) -> Iterator[UserError]:
    """An error for each value that holds a secret, without the value: the file is copied into store and MLflow.

    The runtime environment of workers is left out: it is where secrets for them belong, and is written down without.
    """
    if private_values.is_private(path):
        return
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _secrets(document, item, (*path, name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _secrets(document, item, (*path, number))
    elif isinstance(value, str) and (kind := secret_in(value)):
        dotted = ".".join(str(part) for part in path)
        where = document.where(path, value=False)
        yield UserError(f"{dotted} holds {kind}", where=where, hint=_where_secrets_belong(path, value))


def _where_secrets_belong(path: yaml_source.KeyPath, value: str) -> str:
    """The right way, by what the value is for."""
    if path[0] == "tracking" and value.startswith("http"):
        return (
            "leave it out of the address: MLflow takes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, from the environment"
        )
    if path[0] == "tracking":
        return (
            "leave the password out of the address: PostgreSQL takes PGPASSWORD from the environment or ~/.pgpass, "
            "MySQL an option file (?read_default_file=~/.my.cnf)"
        )
    if path[0] == "store" or value.startswith("s3:"):
        return (
            "leave it out of the address: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or "
            "AWS_PROFILE, are taken from the environment. Write s3://bucket/prefix"
        )
    return "put it into the environment: this file is copied into the store and into MLflow"


def _rename_old_keys(document: yaml_source.Document, stages: Any) -> None:
    """Give keys that were renamed their names of today, and say so in one notice."""
    from orchestrator.stages.registry import kinds_of

    kinds, sections = kinds_of(stages), document.data.get("stages")
    renamed: dict[yaml_source.KeyPath, Mapping[str, str]] = {("elastic",): Elastic.renamed}
    for name, section in sections.items() if isinstance(sections, dict) else ():
        kind = section.get("kind") if isinstance(section, dict) else None
        renamed["stages", name, "elastic"] = Elastic.renamed
        renamed["stages", name] = kinds[kind].renamed if isinstance(kind, str) and kind in kinds else {}
    found = []
    for place, keys in renamed.items():
        values, _ = yaml_source.lookup(document.data, place)
        for old, new in keys.items():
            # Where both are there, the schema reports it.
            if isinstance(values, dict) and old in values and new not in values:
                found.append(f"{document.where((*place, old), value=False)} is now {new}")
                document.rename(place, old, new)
    if found:
        logger.warning("renamed keys, which still work for now: %s", "; ".join(found))


def _with_own_kinds(document: yaml_source.Document, stages: Any) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """The union of stage kinds with those of users' packages that the file names.

    An import path in the file gives way to the kind that its class has.

    Returns:
        The union, and the stages whose kind was an import path, with the path.

    Raises:
        UserError: something that the file names cannot be used.
    """
    from orchestrator.stages.registry import kind_of, kinds_of, stage_class, with_classes

    sections = document.data.get("stages")
    imported = []
    problems = []
    for name, section in sections.items() if isinstance(sections, dict) else ():
        kind = section.get("kind") if isinstance(section, dict) else None
        if not isinstance(kind, str):
            continue
        is_path = installed.is_path(kind)
        # Of a name that nobody has, the schema reports it.
        if not is_path and (kind in kinds_of(stages) or kind not in installed.names("stages")):
            continue
        try:
            found = stage_class(kind, stages)
        except UserError as error:
            where = document.where(("stages", name, "kind"))
            problems.append(UserError(error.what, where=where, hint=error.hint))
            continue
        stages = with_classes(stages, [found])
        if is_path:
            imported.append((name, kind))
            section["kind"] = kind_of(found)
            document.written["stages", name, "kind"] = kind
    if problems:
        raise joined(problems)
    return stages, tuple(imported)


def _all_stages() -> Any:
    from orchestrator.stages import AnyStage

    return AnyStage


def _check(loaded: LoadedPipeline) -> list[UserError]:
    """What the types cannot say: names, and files that must be there."""
    spec = loaded.spec
    problems = []
    if not spec.stages:
        hint = "add one, e.g. `curate: {kind: curate, data: …}`"
        problems.append(UserError("the pipeline has no stages", where=loaded.where("stages"), hint=hint))
    for name in (*spec.stages, *spec.data):
        if not _NAME.fullmatch(name):
            section = "stages" if name in spec.stages else "data"
            where = loaded.document.where((section, name), value=False)
            hint = "use up to 100 of a-z, 0-9, - and _, starting with a letter or digit"
            problems.append(
                UserError(f"{shortened(name, 80)!r} is not a usable name", where=where, hint=hint)
            )
    for name, stage in spec.stages.items():
        for source_name in stage.data_sources():
            if source_name not in spec.data:
                problems.append(_unknown_source(loaded, name, source_name))
        problems += _check_stage(loaded, name, stage)
        problems += _check_exact(loaded, name, stage)
        problems += _check_index(loaded, name, stage)
    problems += _check_store(loaded)
    try:
        absolute_uri(spec.tracking.uri)
    except UserError as error:
        problems.append(UserError(error.what, where=loaded.where("tracking", "uri"), hint=error.hint))
    return problems


def _missing_data(loaded: LoadedPipeline) -> list[UserError]:
    problems = []
    for name, source in loaded.spec.data.items():
        if not source.is_there:
            what = "no such folder" if not source.path.exists() else "not a folder"
            problems.append(_missing(loaded, what, ("data", name, "path"), source.path))
        if source.captions is not None and captions_path(source.captions, source.path) is None:
            what = _no_file(source.captions, source.path / source.captions)
            problems.append(_missing(loaded, what, ("data", name, "captions"), source.captions))
        if source.manifest is not None and captions_path(source.manifest, source.path) is None:
            what = _no_file(source.manifest, source.path / source.manifest)
            problems.append(_missing(loaded, what, ("data", name, "manifest"), source.manifest))
    for name, stage in loaded.spec.stages.items():
        for field, paths in stage.files().items():
            where = ("stages", name, *field.split("."))
            problems += [
                _missing(loaded, _no_file(path), where, path) for path in paths if not path.is_file()
            ]
    return problems


def _fetch_models(loaded: LoadedPipeline) -> list[UserError]:
    """Bring the models of the registry that stages start from here; an error for each that did not come."""
    problems = []
    for name, stage in loaded.spec.stages.items():
        for field, weights in stage.starts_from().items():
            try:
                weights.fetch(loaded.spec.tracking.uri)
            except UserError as error:
                where = loaded.where("stages", name, *field.split("."))
                problems.append(UserError(error.what, where=where, hint=error.hint))
    return problems


def _check_stage(loaded: LoadedPipeline, name: str, stage: Stage) -> list[UserError]:
    """What the stage itself says of the files that it names, if they are there."""
    if not all(path.is_file() for paths in stage.files().values() for path in paths):
        return []
    try:
        _seeing(loaded, stage).check()
    except UserError as error:
        path = error.where.split(".") if error.where else []
        keys = {field.alias or key for key, field in type(stage).model_fields.items()}
        # What is wrong may also be in a file of a dataset, which it names then.
        is_file = bool(path) and path[0] not in keys
        where = error.where if is_file else loaded.where("stages", name, *path)
        return [UserError(error.what, where=where, hint=error.hint)]
    return []


def _seeing(loaded: LoadedPipeline, stage: Stage) -> Stage:
    """The stage as it is when it sees the pictures of its index; as it is where it has none that is known."""
    stages = loaded.spec.stages
    makers = [stages[need] for need in stage.needs if need in stages and stages[need].components]
    sources = makers[0].data_sources() if len(makers) == 1 else ()
    known = [loaded.spec.data[name].pixels for name in sources if name in loaded.spec.data]
    return stage.seeing(known[0]) if known else stage


def _check_index(loaded: LoadedPipeline, name: str, stage: Stage) -> list[UserError]:
    """What the stage says of the index that it needs: who makes that is known before anything runs."""
    stages = loaded.spec.stages
    makers = [stages[need] for need in stage.needs if need in stages and stages[need].components]
    if len(makers) != 1:
        return []
    try:
        stage.check_index(makers[0].made_components(), makers[0].data_sources())
    except UserError as error:
        where = loaded.where("stages", name, *(error.where or "").split("."))
        return [UserError(error.what, where=where, hint=error.hint)]
    return []


def _check_exact(loaded: LoadedPipeline, name: str, stage: Stage) -> list[UserError]:
    """ZeRO 1 and 2 cannot sum exactly: a stage, or its students, say which ZeRO they train with."""
    own: Elastic | None = getattr(stage, "elastic", None)
    if not loaded.spec.elastic.overlaid(own).exact:
        return []
    students: Mapping[str, Any] = getattr(stage, "students", {})
    places = {("stages", name): stage} | {
        ("stages", name, "students", student): settings for student, settings in students.items()
    }
    return [
        UserError(
            "elastic.exact does not work with ZeRO 1 and 2",
            where=loaded.where(*place, "zero_stage"),
            hint="set zero_stage to auto, 0 or 3, or elastic.exact of this stage to false",
        )
        for place, settings in places.items()
        if getattr(settings, "zero_stage", 3) in (1, 2)
    ]


def _no_file(*places: Path) -> str:
    """Why there is no file to read in any of the places."""
    there = next((path for path in places if path.exists()), None)
    if there is None:
        return "no such file"
    return "a folder and no file" if there.is_dir() else "not a regular file"


def _missing(loaded: LoadedPipeline, what: str, path: tuple[str, ...], value: Path) -> UserError:
    from orchestrator.data.weights import fetch_command

    beside = [item.name for item in value.parent.iterdir()] if value.parent.is_dir() else []
    # What has the very name is something else than was wanted.
    beside = [name for name in beside if name != value.name]
    close = nearest(value.name, beside)
    if command := fetch_command(value):
        hint = f"fetch it: {command}"
    elif close:
        hint = f"did you mean {value.parent / close}?"
    elif value.is_absolute():
        hint = "check the path"
    else:
        hint = f"paths are relative to where the command runs, {Path.cwd()}"
    return UserError(f"{what}: {value}", where=loaded.where(*path), hint=hint)


def _unknown_source(loaded: LoadedPipeline, stage: str, source: str) -> UserError:
    close = nearest(source, loaded.spec.data)
    known = ", ".join(loaded.spec.data) or "none"
    return UserError(
        f"stage {stage!r} reads the dataset {source!r}, which is not under `data`",
        where=loaded.where("stages", stage, "data"),
        hint=f"did you mean {close!r}?" if close else f"there are: {known}",
    )


def _check_store(loaded: LoadedPipeline) -> list[UserError]:
    """Whether the store can be used, without making it."""
    uri = loaded.spec.store
    if is_remote(uri):
        try:
            open_store(uri)
        except UserError as error:
            # The value is not repeated where it may hold a password.
            where = f"{loaded.path}  store" if "@" in uri else loaded.where("store")
            return [UserError(error.what, where=where, hint=error.hint)]
        return []
    where = loaded.where("store")
    try:
        folder = folder_of(uri)
    except UserError as error:
        return [UserError(error.what, where=where, hint=error.hint)]
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        return [UserError(f"the store {uri} cannot be created: {existing} is a file", where=where)]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [UserError(f"the store {uri} cannot be written: no permission in {existing}", where=where)]
    return _odd_folders(folder, loaded.name, where)


def _odd_folders(store: Path, pipeline: str, where: str) -> list[UserError]:
    """What is in a store, but no folder, and has the name of a folder that a run writes to."""
    names = [*_STORE_FOLDERS, *(f"{name}/{pipeline}" for name in _OF_A_PIPELINE)]
    return [
        UserError(
            f"{store / name} is not a folder, so the store cannot be used",
            where=where,
            hint="move away what is there",
        )
        for name in names
        if os.path.lexists(store / name) and not (store / name).is_dir()
    ]


def unwritable_folders(loaded: LoadedPipeline) -> list[UserError]:
    """What a run writes to in a local store and cannot; none if the store is not there yet, or elsewhere."""
    if is_remote(loaded.spec.store):
        return []
    names = (*_STORE_FOLDERS, *(f"{name}/{loaded.name}" for name in _OF_A_PIPELINE), SCRATCH)
    store = folder_of(loaded.spec.store)
    return [_unwritable(store / name, loaded) for name in names if _is_unwritable(store / name)]


def unusable_work(loaded: LoadedPipeline, names: Sequence[str]) -> list[UserError]:
    """What is below these folders of a local store, where earlier attempts left something, and ends the next one."""
    store = folder_of(loaded.spec.store)
    found = []
    for top in (store / name for name in names):
        if top.is_symlink():
            if top.parent.name == "artifacts":
                continue  # making the artifact replaces it
            error = not_followed(top)
            found.append(UserError(f"{error.what}: {top}", where=loaded.where("store"), hint=error.hint))
            continue
        if os.path.lexists(top) and not top.is_dir():
            what = f"{top} is not a folder, so its stage cannot run"
            found.append(UserError(what, where=loaded.where("store"), hint="move away what is there"))
            continue
        folders = (Path(folder) for folder, _, _ in os.walk(top))
        # The first one of each place is enough: what has the wrong owner has it as a whole.
        if first := next(filter(_is_unwritable, folders), None):
            found.append(_unwritable(first, loaded))
    return found


def _is_unwritable(folder: Path) -> bool:
    return os.path.lexists(folder) and not os.access(folder, os.W_OK | os.X_OK)


def _unwritable(folder: Path, loaded: LoadedPipeline) -> UserError:
    return UserError(
        f"{folder} cannot be written, so the store cannot be used",
        where=loaded.where("store"),
        hint="change its permissions",
    )
