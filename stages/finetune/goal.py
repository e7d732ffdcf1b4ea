"""What a task of `finetune` is to the rest of the stage: a head, a loss, what is measured, and what its labels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from orchestrator.errors import UserError
from orchestrator.stages.base import ImageCount

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from orchestrator.data.index import ImageIndex
    from orchestrator.data.labelled_blocks import Annotations
    from orchestrator.data.splits import Splits
    from orchestrator.training.task import Losses

Better = Literal["more", "less"]


@dataclass(frozen=True)
class Labelled:
    """The rows of each split that have labels, and what these are.

    Attributes:
        train, validation, test: rows of the index, int64 and ascending; none is empty.
        classes: their names in the order of the head's outputs; empty for a task without classes.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    classes: tuple[str, ...] = field(default=())


class Goal(Protocol):
    """A task on the side of torch."""

    def head(self, dim: int) -> nn.Module:
        """What makes predictions of features of width `dim`: called with features and the size of the images."""

    def losses(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Losses:
        """The loss of a block, a mean over its samples with their "weights"; and metrics of a step."""

    def sums(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What metrics are computed from, float64 (K,): it adds up over blocks. Samples of weight 0 count nothing."""

    def metrics(self, sums_K: Tensor) -> dict[str, float]:
        """Figures of all blocks whose sums these are."""


@runtime_checkable
class ListsGoal(Protocol):
    """A task with metrics that no sums give: they are computed of what was found in every image of a split."""

    def listed(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> list[Any]:
        """What was found in each image of a block, and what is there; samples of weight 0 are left out."""

    def scores(self, listed: Sequence[Any]) -> dict[str, float]:
        """Figures of all images of a split."""


class TaskSettings(Protocol):
    """A task on the side of the pipeline file."""

    needs_index: ClassVar[bool]
    """Whether its images are those of an index; else it has a data set of its own."""

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Files of its own data set, by field."""

    def check(self) -> None:
        """Look at its own data set, before anything runs; raises UserError."""

    @property
    def chosen_by(self) -> tuple[str, Better]:
        """The figure of the validation split by which the best weights are chosen, and whether more is better."""

    def preflight(self, photos: ImageCount) -> UserError | None:
        """What the number of labels that there are says against it."""

    def head_params(self, dim: int) -> int:
        """Weights of the head, for costs; `dim` is the width of the backbone's features."""

    def labelled(self, index: ImageIndex, splits: Splits, where: str) -> Labelled:
        """Which rows have labels; raises UserError if they cannot be learnt."""

    def annotations(self, index: ImageIndex, classes: Sequence[str]) -> Annotations:
        """What blocks bring along of the rows' labels."""

    def goal(self, classes: Sequence[str]) -> Goal:
        """The task for torch."""

    def record(self) -> dict[str, Any]:
        """What it takes to build the head again, beside its classes; plain JSON."""
