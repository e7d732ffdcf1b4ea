"""Classification: settings of the task, its labels, and what is computed of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.config.settings import Settings
from orchestrator.errors import UserError, nearest, shortened
from orchestrator.stages.base import ImageCount
from orchestrator.stages.finetune.goal import Better, Goal, Labelled

if TYPE_CHECKING:
    from orchestrator.data.index import ImageIndex
    from orchestrator.data.labelled_blocks import Annotations
    from orchestrator.data.splits import Splits

_SPLITS = ("train", "validation", "test")


class Classification(Settings):
    """One label per image. The head is a linear layer; the loss is cross-entropy."""

    type: Literal["classification"] = Field(description="The name of the task, classification.")
    labels: Literal["column", "folder"] = Field(
        "column",
        description="Where an image's label comes from. column: the `label` column of the dataset's captions file. "
        "folder: the first folder below the dataset's path.",
    )
    classes: Annotated[int, Field(ge=2)] | tuple[str, ...] | None = Field(
        None,
        description="The labels to learn: a list, or a number for the most frequent ones. Images with other labels are "
        "left out. Default: all labels.",
    )
    pool: Literal["cls", "cls_and_patches"] = Field(
        "cls_and_patches",
        description="The features that the head reads: CLS, or CLS and the mean of the patches.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The share of the target that is spread evenly over all classes, from 0 to below 1.",
    )

    needs_index: ClassVar[bool] = True

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See `TaskSettings`."""
        return {}

    def check(self) -> None:
        """See `TaskSettings`."""

    @property
    def chosen_by(self) -> tuple[str, Better]:
        """See `TaskSettings`."""
        return "accuracy", "more"

    def preflight(self, photos: ImageCount) -> UserError | None:
        """See `TaskSettings`."""
        if self.labels == "folder" or photos.labels:
            return None
        return UserError(
            f"none of the {photos.photos} images has a label to learn",
            where="task",
            hint="give the dataset a `captions` file with a `label` column, or write `labels: folder`",
        )

    def head_params(self, dim: int) -> int:
        """See `TaskSettings`. How many labels there are is not known before they are read: about a thousand."""
        count = self.classes if isinstance(self.classes, int) else len(self.classes or range(1000))
        return (dim * (1 if self.pool == "cls" else 2) + 1) * count

    def labelled(self, index: ImageIndex, splits: Splits, where: str) -> Labelled:
        """See `TaskSettings`.

        Raises:
            UserError: one class only, classes that nobody has, or labels that the training split lacks.
        """
        index = self._index(index)
        every = self.classes is None
        names = splits.labels(index, f"{where}.split") if every else self._chosen(index, splits, where)
        wanted = set(names)
        rows = {
            split: getattr(splits, split)[[index[int(row)].label in wanted for row in getattr(splits, split)]]
            for split in _SPLITS
        }
        return Labelled(**rows, classes=names)

    def _chosen(self, index: ImageIndex, splits: Splits, where: str) -> tuple[str, ...]:
        """The classes that the file asks for, sorted."""
        where = f"{where}.task.classes"
        counted = {
            split: Counter(label for row in getattr(splits, split) if (label := index[int(row)].label))
            for split in _SPLITS
        }
        everywhere = counted["train"] + counted["validation"] + counted["test"]
        if isinstance(self.classes, int):
            # Of equally frequent ones the first by name.
            ranked = sorted(everywhere.items(), key=lambda item: (-item[1], item[0]))
            names = tuple(sorted(label for label, _ in ranked[: self.classes]))
            if len(names) < self.classes:
                raise UserError(
                    f"there are {len(names)} labels, and the {self.classes} most frequent are asked for",
                    where=where,
                    hint=f"use at most {len(names)}" if len(names) > 1 else "give images labels",
                )
        else:
            names = tuple(sorted(set(self.classes or ())))
            for name in names:
                if name not in everywhere:
                    close = nearest(name, everywhere)
                    raise UserError(
                        f"no image has the label {name!r}",
                        where=where,
                        hint=f"did you mean {close!r}?"
                        if close
                        else f"there are: {shortened(', '.join(sorted(everywhere)), 300)}",
                    )
            if len(names) < 2:
                raise UserError(
                    f"there is only one class, {names[0]!r}" if names else "the list of classes is empty",
                    where=where,
                    hint="give at least two",
                )
        for split in _SPLITS:
            lacking = [name for name in names if name not in counted[split]]
            # A class that validation or test lacks is not measured there.
            if split == "train" and lacking:
                raise UserError(
                    f"no training image has the label{'s' if len(lacking) > 1 else ''} "
                    f"{shortened(', '.join(map(repr, lacking)), 200)}",
                    where=where,
                    hint="leave it out, or give the training split more images",
                )
            if len(lacking) == len(names):
                raise UserError(
                    f"no image of the {split} split has one of these labels",
                    where=where,
                    hint="choose others, or give the split more images",
                )
        return names

    def annotations(self, index: ImageIndex, classes: Sequence[str]) -> Annotations:
        """See `TaskSettings`."""
        import numpy as np

        from orchestrator.data.labelled_blocks import ClassLabels

        numbers = {name: number for number, name in enumerate(classes)}
        labels = self._index(index).labels
        return ClassLabels(np.array([numbers.get(label or "", -1) for label in labels], dtype=np.int64))

    def goal(self, classes: Sequence[str]) -> Goal:
        """See `TaskSettings`."""
        from orchestrator.stages.finetune.class_goal import ClassGoal

        return ClassGoal(len(classes), self.pool, self.label_smoothing)

    def record(self) -> dict[str, Any]:
        """See `TaskSettings`."""
        return {"type": self.type, "pool": self.pool}

    def _index(self, index: ImageIndex) -> ImageIndex:
        """The index with the labels that this task learns."""
        if self.labels == "column":
            return index
        from orchestrator.data.index import ImageIndex

        return ImageIndex([replace(one, label=_folder(one.path)) for one in index])


def _folder(path: str) -> str | None:
    """The first folder of a path; None of a file that is in none."""
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else None
