"""Which model is meant: a folder of this machine, or a registered one, which is fetched into the cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from orchestrator import disk
from orchestrator.errors import UserError, shortened
from orchestrator.fsio import DIGESTS, why
from orchestrator.storage.cache_folder import cache_folder
from orchestrator.tracking import download, model_files, references

TRACKING = "sqlite:///runs/mlflow.db"
"""Where the registry is unless the user says: as for `orchestrator pull`."""

SPELLINGS = f"a folder with a model, or a registered model as {references.SPELLINGS}"


@dataclass(frozen=True)
class Located:
    """A model on this machine.

    Attributes:
        path: of its folder or file.
        name: by which the same weights are found again: `NAME:VERSION`, or the absolute path.
    """

    path: Path
    name: str


def locate(model: str | os.PathLike[str], tracking: str | None = None) -> Located:
    """The model that is meant; a registered one is fetched unless the cache has it.

    A path object is a path, and a text what :func:`orchestrator.tracking.references.registered` says. Only a bare NAME
    can be either: a file or folder here goes first.

    Args:
        model: see :func:`orchestrator.load`.
        tracking: the address of the MLflow server or database.

    Raises:
        UserError: there is no such model, or a text that could mean both.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise UserError(f"this is not a path: {shortened(repr(model), 80)}", hint=f"give {SPELLINGS}")
    text = os.fspath(model)
    reference = references.registered(text) if isinstance(model, str) else None
    if reference is None or reference.is_bare:
        path = disk.named(text)
        if path.exists():
            return Located(path, str(path.absolute()))
        if reference is None:
            raise UserError(f"no model can be loaded: {path} does not exist", hint=_hint(text))
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI") or TRACKING
    try:
        version, folder = download.cached(text, uri, cache_folder() / "models")
    except UserError as error:
        if not reference.is_bare:
            raise
        raise UserError(
            f"no model can be loaded: there is no folder {model!r} here, and in the registry: {error.what}",
            where=error.where,
            hint=error.hint,
        ) from error
    return Located(folder, f"{version.name}:{version.number}")


def _hint(path: str) -> str:
    """What to write instead of a path that does not exist."""
    meant = references.parsed(path)
    if meant.is_whole and meant.version is not None and meant.version.isdecimal():
        return f"write {meant.name}:{meant.version} for version {meant.version} of the registered model {meant.name}"
    return f"give {SPELLINGS}"


def inner_folder(path: Path) -> Path:
    """Where the weights are in what :func:`locate` found: `model/` or `aligned/` of an artifact, or itself."""
    for inside in ("model", "aligned"):
        if (path / inside / "config.json").is_file():
            return path / inside
    return path


def weights_digest(path: Path) -> str:
    """One sha256 of a model: of its weights, config and tokenizer, wherever they lie and whatever lies beside them.

    A stage's artifact and what was published of it have the same.

    Raises:
        UserError: a file cannot be read.
    """
    folder = inner_folder(path)
    try:
        if not folder.is_dir():
            return DIGESTS.of(folder)
        files = sorted(
            file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors") and file.is_file()
        )
        return model_files.content_digest(
            {file.relative_to(folder).as_posix(): DIGESTS.of(file) for file in files}
        )
    except OSError as error:
        raise UserError(f"the model cannot be read: {why(error)}", where=str(folder)) from error
