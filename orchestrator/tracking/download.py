"""A registered model out of MLflow: looked up, downloaded, compared with the digest of its files, and cached."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import disk
from orchestrator.errors import UserError, shortened
from orchestrator.fsio import move, why
from orchestrator.redact import redacted
from orchestrator.tracking import relocate
from orchestrator.tracking.answers import answering, require_database
from orchestrator.tracking.connect import absolute_uri, connect
from orchestrator.tracking.model_files import (
    CONTENT_TAG,
    content_digest,
    contents_of,
    require_plain,
)
from orchestrator.tracking.patience import interruptibly
from orchestrator.tracking.references import resolve

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_DIGEST = re.compile(r"[0-9a-f]{64}")


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
            require_plain(folder, staging, reference)
            if version.tags.get(CONTENT_TAG, "") != content_digest(contents_of(folder)):
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
        return folder.is_dir() and content_digest(contents_of(folder)) == content
    except OSError:
        return False


def _client_of(uri: str) -> MlflowClient:
    """A client of a registry that is there. Raises UserError."""
    require_database(uri)
    with answering(uri, where=uri):
        return connect(uri)


def _address(store: str) -> str:
    return store.rstrip("/") if "://" in store else Path(store).expanduser().absolute().as_uri()
