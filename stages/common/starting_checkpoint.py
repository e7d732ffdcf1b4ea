"""The checkpoint of another stage that training starts from: workers read their slices, in a folder or in the store."""

from __future__ import annotations

from pathlib import Path

from orchestrator.stages.base import Context
from orchestrator.storage.open import Needed
from orchestrator.storage.store import HasRanges
from orchestrator.training.checkpoint.format import COMMIT

CHECKPOINT = "checkpoint"
_ROLE = "backbone"


def stored_checkpoint(context: Context) -> tuple[HasRanges, str] | None:
    """The store whose objects are read for the slices, and the prefix of the checkpoint's files in it.

    None where the files are in a folder: that of the store, or a copy where the store gives whole objects only.
    """
    backbone = context.inputs.get(_ROLE)
    if backbone is None or context.remote is None or not isinstance(context.remote[0], HasRanges):
        return None
    return context.remote[0], f"{backbone.object_name(CHECKPOINT)}/"


def needed_to_start(context: Context, *files: Path | None) -> tuple[Needed, ...]:
    """What workers fetch first: of a backbone whose checkpoint they read in the store, its manifest and these files."""
    if stored_checkpoint(context) is None:
        return context.needed
    top = context.inputs[_ROLE].path
    named = [file.relative_to(top).as_posix() for file in files if file is not None]
    return context.needed_of({_ROLE: [f"{CHECKPOINT}/{COMMIT}", *named]})
