"""The manifest of an artifact: its files with their sha256, where it came from, and what its stage returned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import UserError, first_line
from orchestrator.names import parts_of

MANIFEST = "manifest.json"
FORMAT = 1


class FileEntry(BaseModel):
    """One file of an artifact: size in bytes and sha256 in hex."""

    model_config = ConfigDict(frozen=True, extra="allow")

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def _file_name(name: str) -> str:
    parts_of(name)
    if name == MANIFEST:
        raise ValueError(f"{MANIFEST} does not list itself")
    return name


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_pieces(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 and all(isinstance(text, str) for text in one)
        for one in value
    )


def _is_code(value: object) -> bool:
    """Of earlier versions it is one hash."""
    if isinstance(value, str):
        return True
    return (
        isinstance(value, dict)
        and isinstance(value.get("digest", ""), str)
        and _is_texts(value.get("files", {}))
    )


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


# What is read of a provenance, and how it looks; the rest may be anything.
_READ: dict[str, Callable[[object], bool]] = {
    "parts": lambda value: isinstance(value, dict) and _is_texts(value.get("inputs", {})),
    "inputs": _is_texts,
    "pieces": _is_pieces,
    "code": _is_code,
    "versions": _is_texts,
    "made_by": _is_texts,
    "stage": _is_text,
    "run_id": _is_text,
    "command": _is_text,
}


def _readable(provenance: dict[str, Any]) -> dict[str, Any]:
    wrong = [name for name, fits in _READ.items() if name in provenance and not fits(provenance[name])]
    if wrong:
        raise ValueError(f"no valid {', '.join(wrong)}")
    return provenance


class Manifest(BaseModel):
    """What an artifact holds and where it came from. Fields of a later version are kept as they are.

    Attributes:
        format: of the manifest; one with a higher format is of a later version and is left alone.
        kind: the kind of stage that made it.
        key: the content key of the stage that made it.
        created: UTC, ISO 8601.
        files: by path relative to the artifact's folder, POSIX style.
        provenance: whatever explains it: config, upstream keys, versions.
        summary: the figures the stage returned.
    """

    # JSON has no NaN and pydantic would write null, which is not a float when read back.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants", extra="allow")

    format: int = Field(FORMAT, ge=1, le=FORMAT)
    kind: str
    key: str
    created: str
    files: dict[Annotated[str, AfterValidator(_file_name)], FileEntry]
    provenance: Annotated[dict[str, Any], AfterValidator(_readable)]
    summary: dict[str, float]

    @property
    def digest(self) -> str:
        """A hash of the content alone (16 hex digits): two artifacts of one key need not be equal to the last bit."""
        whole = hashlib.sha256()
        for name, entry in sorted(self.files.items()):
            whole.update(f"{len(name)}:{name}={entry.sha256};".encode())
        return whole.hexdigest()[:16]

    @property
    def made_by(self) -> Mapping[str, str]:
        """The versions of `python` and of this package that made the artifact, as far as it says."""
        found = self.provenance.get("made_by")
        return {str(name): str(version) for name, version in found.items()} if isinstance(found, dict) else {}


class _ManifestFormat(BaseModel):
    """As much of a manifest as any version can read."""

    format: int = 1


def parsed(text: bytes) -> Manifest:
    """The manifest that reads `text`.

    Raises:
        ValueError: it is none.
        UserError: it is one of a later version.
    """
    try:
        manifest_format = _ManifestFormat.model_validate_json(text).format
    except ValidationError as error:
        raise ValueError(first_line(error)) from None
    if manifest_format > FORMAT:
        raise UserError(
            f"the artifact has format {manifest_format}, and this version reads formats up to {FORMAT}",
            hint="use the version of orchestrator that wrote it, or a later one",
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(first_line(error).replace(": Value error, ", ": ")) from None
    if not manifest.files:
        raise ValueError("it lists no files")
    return manifest
