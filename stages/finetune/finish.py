"""What is done with the best step of a fine-tuning: its model is made, and scored on the validation and the test split.

It runs on the machine of a worker, so that neither weights nor features pass through the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.index import pixels_in
from orchestrator.stages.finetune.blocks import split_blocks
from orchestrator.stages.finetune.export import save_finetuned
from orchestrator.stages.finetune.score import score_split

if TYPE_CHECKING:
    from orchestrator.stages.finetune.config import Finetune
    from orchestrator.stages.finetune.goal import Labelled
    from orchestrator.stages.finetune.start import StartingBackbone
    from orchestrator.training.job import Job

# The folder of the model in the artifact.
MODEL = "model"
_SCORED = ("validation", "test")


@dataclass(frozen=True)
class Finished:
    """The figures of a finished model.

    Attributes:
        sizes: how many weights were trained, and how many of these are the head's.
        scores: its figures by split.
    """

    sizes: Mapping[str, float]
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Finishing:
    """All that it takes, to be called in a task.

    Attributes:
        config: the stage's.
        start: what training started from.
        labelled: the rows of each split.
        index: the folder of the index.
        roots: where the photographs of each dataset are now.
        step: the best step; it was exported.
    """

    config: Finetune
    start: StartingBackbone
    labelled: Labelled
    index: Path
    roots: Mapping[str, str]
    step: int

    def __call__(self, job: Job, check: Callable[[], None]) -> Finished:
        """Make the model in `job.finished`, and score it.

        Raises:
            UserError: an image cannot be read, or the backbone that training started from is damaged.
        """
        sizes = job.make_finished(self.step, self._save)
        goal, device = self.config.task.goal(self.labelled.classes), job.elastic.device
        blocks = partial(split_blocks, self.config, self.index, self.labelled, roots=self.roots)
        scores = {
            name: score_split(
                goal,
                blocks(name, self.start.image_size),
                job.finished / MODEL,
                device,
                self.start.modules,
                check,
            )
            for name in _SCORED
        }
        return Finished(sizes, scores)

    def _save(self, export: Path, folder: Path) -> dict[str, float]:
        classes, seen = self.labelled.classes, pixels_in(self.index)
        return save_finetuned(self.config, self.start, classes, export, folder / MODEL, seen)
