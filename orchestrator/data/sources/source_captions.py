"""Captions and labels of a dataset's files, from its table or its manifest, and from its folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.config.schema import DataSource
from orchestrator.data.image_formats import readable_endings
from orchestrator.data.sources import manifest, remote, shards
from orchestrator.data.sources.captions import (
    Captions,
    Note,
    captions_path,
    reads_as_before,
)
from orchestrator.data.sources.captions import read as read_captions
from orchestrator.data.sources.shard_members import shard_of
from orchestrator.errors import UserError


def captions_of(source: DataSource, name: str, files: Sequence[str]) -> Captions:
    """What the source's captions file says of its photos; nothing if it has none.

    Args:
        source: the folder.
        name: the source's name, for messages.
        files: of :func:`list_images`.

    Raises:
        UserError: as :func:`orchestrator.data.sources.captions.read`, and if there is no such file.
    """
    if source.shards is not None:
        tars = sorted({shard_of(file) for file in files})
        stamps = None
        if source.is_remote:
            stamps = {item.path: item.stamp for item in remote.objects(source.path)}
        return shards.contents(source.path, tars, readable_endings(), stamps).said
    if source.manifest is not None:
        said = manifest.read(manifest_of(source, name), source.path).said.of(files)
    else:
        path = table_of(source, name)
        said = Captions({}) if path is None else read_captions(path, source.path, files)
    return said if source.labels is None else _with_folders(said, files)


def _with_folders(said: Captions, files: Sequence[str]) -> Captions:
    """Labels from the first folder below the source for photos whose table gives none."""
    notes: dict[str, Note] = {}
    for file in files:
        caption, label = said.notes.get(file, (None, None))
        folder, slash, _ = file.partition("/")
        notes[file] = caption, label or (folder if slash else None)
    return replace(said, notes=notes)


def table_of(source: DataSource, name: str) -> Path | None:
    """The captions file as given, or else inside the source's folder; None if none is named. Raises UserError."""
    if source.captions is None:
        return None
    path = captions_path(source.captions, source.path)
    if path is None:
        raise UserError(
            f"the captions file {source.captions} of dataset {name!r} {_lacking(source)}",
            where=f"data.{name}.captions",
            hint="give its path from here or from the source's folder",
        )
    return path


def _lacking(source: DataSource) -> str:
    captions = source.captions
    there = captions is not None and (captions.exists() or (source.path / captions).exists())
    return "is not a regular file" if there else "does not exist"


def table_reads_as_before(captions: Path) -> bool:
    """Whether the captions file says what it always did; so does one that cannot be read, which says nothing."""
    try:
        return reads_as_before(captions)
    except UserError:
        return True


def manifest_of(source: DataSource, name: str) -> Path:
    """The manifest as given, or else inside the source's folder. Raises UserError if there is none."""
    assert source.manifest is not None
    path = captions_path(source.manifest, source.path)
    if path is None:
        raise UserError(
            f"the manifest {source.manifest} of dataset {name!r} does not exist",
            where=f"data.{name}.manifest",
            hint="give its path from here or from the source's folder",
        )
    return path
