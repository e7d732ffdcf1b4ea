"""Detection: settings of the task, its data set, and what is computed of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.config.boxes import BoxData
from orchestrator.config.settings import Settings
from orchestrator.errors import UserError, shortened
from orchestrator.stages.base import ImageCount
from orchestrator.stages.finetune.goal import Better, Goal, Labelled

if TYPE_CHECKING:
    from orchestrator.data.boxes import BoxPictures
    from orchestrator.data.index import ImageIndex
    from orchestrator.data.labelled_blocks import Annotations
    from orchestrator.data.splits import Splits

logger = logging.getLogger("orchestrator")

_SPLITS = ("train", "validation", "test")


class Detection(Settings):
    """Boxes of objects with their classes, by a small DETR head on the patches (arXiv 2005.12872)."""

    type: Literal["detection"] = Field(description="The name of the task, detection.")
    data: BoxData = Field(description="The pictures and their boxes, with their split.")
    num_queries: int = Field(
        20, ge=1, le=1000, description="The maximum number of objects that are found in an image."
    )
    width: int = Field(
        128, ge=16, le=4096, multiple_of=16, description="The number of channels of the head's decoder."
    )
    num_layers: int = Field(3, ge=1, le=24, description="The number of layers of the head's decoder.")
    no_object: float = Field(
        0.1,
        gt=0,
        le=1,
        description="The weight, in the cross-entropy, of queries that are matched with no object (arXiv 2005.12872: "
        "0.1).",
    )

    needs_index: ClassVar[bool] = False

    @property
    def dataset(self) -> BoxData:
        """The pictures and their boxes."""
        return self.data

    @property
    def shape(self) -> dict[str, int]:
        """Of the head."""
        return {"num_queries": self.num_queries, "width": self.width, "num_layers": self.num_layers}

    @property
    def chosen_by(self) -> tuple[str, Better]:
        """See `TaskSettings`: average precision is computed once, of the finished model."""
        return "set_loss", "less"

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See `TaskSettings`: the boxes, the pictures that they are in, and what splits them."""
        split = self.data.split.files() if self.data.split is not None else {}
        found = {
            "data.annotations": self.data.annotations,
            **{f"data.split.{field}": paths for field, paths in split.items()},
        }
        if not all(path.is_file() for path in self.data.annotations):
            return found
        try:
            return {**found, "data.path": tuple(self.pictures().paths)}
        except UserError:
            return found  # `check` tells it

    def check(self) -> None:
        """See `TaskSettings`: boxes that are none, and pictures of another size than their boxes are in."""
        self.pictures().check()

    def preflight(self, photos: ImageCount) -> UserError | None:
        """See `TaskSettings`: the data set is looked at in `check`."""
        return None

    def pictures(self) -> BoxPictures:
        """The data set, opened."""
        from orchestrator.data.boxes import BoxPictures

        return BoxPictures(self.data)

    def head_params(self, dim: int) -> int:
        """See `TaskSettings`; for 80 classes."""
        width = self.width
        layer = 2 * 4 * width**2 + 8 * width**2
        return dim * width + self.num_queries * width + self.num_layers * layer + width * (81 + width + 4)

    def labelled(self, index: ImageIndex, splits: Splits, where: str) -> Labelled:
        """See `TaskSettings`: classes are the categories that boxes of the training split have, by their names.

        Raises:
            UserError: no box to train on, or categories that the training split lacks.
        """
        pictures = self.pictures()
        found = {
            name: {int(one) for row in getattr(splits, name).tolist() for one in pictures.boxes(row)[1]}
            for name in _SPLITS
        }
        if not found["train"]:
            raise UserError(
                "no picture of the training split has a box",
                where=f"{where}.task.data",
                hint="change the split",
            )
        for name in _SPLITS[1:]:
            if unseen := sorted(found[name] - found["train"]):
                names = ", ".join(pictures.names[one] for one in unseen)
                raise UserError(
                    f"boxes of {name} have categories that those of train lack: {shortened(names, 200)}",
                    where=f"{where}.task.data.split",
                    hint="put pictures of each category into train, or give the split another `seed`",
                )
        numbers = sorted(found["train"])
        names_of = [pictures.names[one] for one in numbers]
        # Also one that no box has: by its name the other one is found.
        every = list(pictures.names.values())
        if twice := next((name for name in names_of if every.count(name) > 1), None):
            raise UserError(
                f"two categories are called {twice!r}",
                where=f"{where}.task.data.annotations",
                hint="rename one",
            )
        counts = [len(pictures.boxes(row)[1]) for row in range(len(pictures))]
        if crowded := sum(count > self.num_queries for count in counts):
            logger.warning(
                "%s.task.num_queries: %d of %d pictures have more than %d objects, up to %d; the smallest of theirs "
                "are neither learnt nor counted in figures",
                where, crowded, len(counts), self.num_queries, max(counts),
            )  # fmt: skip
        return Labelled(splits.train, splits.validation, splits.test, tuple(names_of))

    def annotations(self, index: ImageIndex, classes: Sequence[str]) -> Annotations:
        """See `TaskSettings`."""
        from orchestrator.data.labelled_blocks import BoxLabels

        pictures = self.pictures()
        number_of = {name: number for number, name in pictures.names.items()}
        return BoxLabels(pictures, [number_of[name] for name in classes], self.num_queries)

    def goal(self, classes: Sequence[str]) -> Goal:
        """See `TaskSettings`."""
        from orchestrator.stages.finetune.detection_goal import DetectionGoal

        return DetectionGoal(len(classes), no_object=self.no_object, **self.shape)

    def record(self) -> dict[str, Any]:
        """See `TaskSettings`."""
        return {"type": self.type, **self.shape}
