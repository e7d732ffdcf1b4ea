"""The files of a published model: which there may be, their digests, and one digest over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.fsio import DIGESTS

CONTENT_TAG = "orchestrator.sha256"
_SUFFIXES = (".safetensors", ".json", ".md", ".png")
# MLflow reads it and finds there how to load the model.
_MLMODEL = "MLmodel"


def content_digest(files: Mapping[str, str]) -> str:
    """One sha256 over the names and the sha256 of files."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items(), key=lambda item: Path(item[0])):
        digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()


def contents_of(folder: Path) -> dict[str, str]:
    """The sha256 of all files of `folder`, by name."""
    return {path.relative_to(folder).as_posix(): DIGESTS.of(path) for path in _files(folder)}


def require_trained(name: str, contents: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """See that files are those that were trained, by their digests. Raises UserError."""
    wrong = sorted(file for file, digest in digests.items() if contents.get(file) != digest)
    if wrong:
        raise UserError(
            f"cannot publish {name}: {wrong[0]} is not the file that was trained, its sha256 differs",
            hint="run the pipeline again: damaged artifacts are made again",
        )


def require_plain(folder: Path, staging: Path, reference: str) -> None:
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


def require_model(folder: Path) -> None:
    """See that a folder has the files of a model and no others. Raises ValueError."""
    files = _files(folder)
    if strange := _no_model_files(folder):
        raise ValueError(f"a published model may only contain {', '.join(_SUFFIXES)} files, not {strange[0]}")
    if folder / "config.json" not in files or not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"{folder} does not contain a model: config.json and a safetensors file are needed")
