"""Which model is meant: a folder of this machine, or a registered one, which is fetched into the cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from orchestrator import disk
from orchestrator.errors import UserError, shortened
from orchestrator.fsio import DIGESTS, why
from orchestrator.storage.cache_folder import cache_folder
from orchestrator.tracking import registry

TRACKING = "sqlite:///runs/mlflow.db"
"""Where the registry is unless the user says: as for `orchestrator pull`."""

SPELLINGS = "a folder with a model, or a registered model as NAME@ALIAS, NAME:VERSION or NAME"

_ALIAS = "champion"
_REGISTERED = re.compile(r"(?P<name>[^/\\:@]+)(?:@(?P<alias>[^/\\:@]+)|:(?P<version>[0-9]+))?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


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

    The spelling decides, not what happens to be there: a path object and a text with a `/` are paths, `NAME@ALIAS` and
    `NAME:VERSION` are registered models. Only a bare NAME can be either: a file or folder here goes first.

    Args:
        model: see :func:`orchestrator.load`.
        tracking: the address of the MLflow server or database.

    Raises:
        UserError: there is no such model, or a text that could mean both.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise UserError(f"this is no path: {shortened(repr(model), 80)}", hint=f"give {SPELLINGS}")
    text = os.fspath(model)
    path = disk.named(text)
    # `~name` is somebody's home, and `..` the folder above.
    may_be_registered = isinstance(model, str) and text[:1] not in ("~", ".")
    spelled = _REGISTERED.fullmatch(text) if may_be_registered else None
    if spelled is None:
        if not path.exists():
            raise UserError(f"no model can be loaded: {path} does not exist", hint=_hint(text))
        return Located(path, str(path.absolute()))
    name, alias, version = spelled["name"], spelled["alias"], spelled["version"]
    is_bare = alias is None and version is None
    if path.exists() and is_bare:
        return Located(path, str(path.absolute()))
    if path.exists():
        raise UserError(
            f"{text!r} is a registered model by its spelling, and there is "
            f"{'a folder' if path.is_dir() else 'a file'} of that name here",
            hint=f"write ./{text} for what is here; to use the registered model, give what is here another name",
        )
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI") or TRACKING
    try:
        return _fetched(f"{name}/{int(version)}" if version else f"{name}@{alias or _ALIAS}", uri)
    except UserError as error:
        if not is_bare:
            raise
        raise UserError(
            f"no model can be loaded: there is no folder {model!r} here, and no model {name}@{_ALIAS} in the "
            f"registry: {error.what}",
            where=error.where,
            hint=error.hint,
        ) from error


def _hint(model: str) -> str:
    """What to write instead of a path that does not exist."""
    name, slash, version = model.rpartition("/")
    if slash and version.isdecimal() and _REGISTERED.fullmatch(name):
        return f"write {name}:{version} for version {version} of the registered model {name}"
    return f"give {SPELLINGS}"


def _fetched(reference: str, uri: str) -> Located:
    version, folder = registry.cached(reference, uri, cache_folder() / "models")
    return Located(folder, f"{version.name}:{version.number}")


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
        return registry.content_digest(
            {file.relative_to(folder).as_posix(): DIGESTS.of(file) for file in files}
        )
    except OSError as error:
        raise UserError(f"the model cannot be read: {why(error)}", where=str(folder)) from error
