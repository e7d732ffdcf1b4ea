"""The pictures of a `finetune` stage as an index: that of a `curate` stage, or one of the task's own data set."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.stages.base import Context
from orchestrator.stages.finetune.classification import Classification
from orchestrator.storage.open import Needed

if TYPE_CHECKING:
    from orchestrator.stages.finetune.config import Finetune

_KIND = "index"


@dataclass(frozen=True)
class Indexed:
    """An index of pictures.

    Attributes:
        folder: as `ImageIndex.save` wrote it.
        needed: the artifact that workers on other machines fetch first, as `Context.needed`.
    """

    folder: Path
    needed: tuple[Needed, ...] = ()


@contextlib.contextmanager
def indexed(config: Finetune, context: Context) -> Iterator[Indexed]:
    """The pictures of a stage; those of a data set of its own are listed once.

    Raises:
        UserError: a piece of the data set is missing or cannot be read.
    """
    task = config.task
    if isinstance(task, Classification):
        yield Indexed(context.inputs["index"].path)
        return
    with context.part(_KIND, {"data": task.dataset.identity()}) as part:
        folder = part.artifact
        if folder is None:
            made = part.work / "made"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            task.pictures().index().save(made)
            folder = part.publish(made, {})
        needed = (Needed(context.remote[0].uri, _KIND, part.key),) if context.remote is not None else ()
        yield Indexed(folder, needed)
