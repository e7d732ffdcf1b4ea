"""Segmentation and depth: settings of the tasks, their data sets, and what belongs to a crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.config.dense import DepthData, MaskData, in_key
from orchestrator.config.settings import Settings
from orchestrator.errors import UserError, shortened
from orchestrator.stages.base import ImageCount
from orchestrator.stages.finetune.goal import Better, Goal, Labelled

if TYPE_CHECKING:
    from orchestrator.data.dense import DensePictures
    from orchestrator.data.index import ImageIndex
    from orchestrator.data.labelled_blocks import Annotations
    from orchestrator.data.splits import Splits

_SPLITS = ("train", "validation", "test")


class _Dense(Settings):
    """A task with a value for every pixel, on a data set of its own."""

    head: Literal["linear", "decoder"] = Field(
        "linear",
        description="The layers that make the map. linear: one linear layer on the patches. decoder: convolutions, "
        "between which the sides of the map double.",
    )
    width: int = Field(
        128,
        ge=16,
        le=4096,
        multiple_of=16,
        description="The number of channels of the decoder's convolutions.",
    )
    num_doublings: int = Field(
        2, ge=1, le=5, description="How many times the decoder doubles the sides of the map of patches."
    )

    needs_index: ClassVar[bool] = False

    @property
    def dataset(self) -> MaskData | DepthData:
        """The pictures and their targets."""
        raise NotImplementedError

    @property
    def shape(self) -> dict[str, int]:
        """Of the head."""
        return {"width": self.width, "num_doublings": self.num_doublings if self.head == "decoder" else 0}

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See `TaskSettings`: pictures, targets, and what splits them."""
        from orchestrator.data.sources.captions import captions_path
        from orchestrator.data.sources.masks import manifest_of, mask_pairs

        data = self.dataset
        try:
            if isinstance(data, DepthData):
                return data.in_key("data.path")
            pairs, table = mask_pairs(data), manifest_of(data)
        except UserError:
            # What is missing is then told as missing, and `check` tells what else is wrong.
            if isinstance(data, MaskData) and data.manifest is not None:
                return {"data.manifest": (captions_path(data.manifest, data.path) or data.manifest,)}
            return {"data.path": (data.path / "images",)}
        found = in_key(data.path, pairs, data.split, "data.path")
        # Its weights count, too.
        return found if table is None else {**found, "data.manifest": (table,)}

    def check(self) -> None:
        """See `TaskSettings`: targets of another size or in other units."""
        self.pictures().check()

    def preflight(self, photos: ImageCount) -> UserError | None:
        """See `TaskSettings`: the data set is looked at in `check`."""
        return None

    def pictures(self) -> DensePictures:
        """The data set, opened."""
        from orchestrator.data.dense import DensePictures

        return DensePictures(self.dataset)

    def _head_params(self, dim: int, channels: int) -> int:
        if self.head == "linear":
            return (dim + 1) * channels
        width = self.width
        doubling = 9 * width * width + 3 * width
        return (dim + 1) * width + self.num_doublings * doubling + (width + 1) * channels


class Segmentation(_Dense):
    """A class for every pixel; the loss is cross-entropy."""

    type: Literal["segmentation"] = Field(description="The name of the task, segmentation.")
    data: MaskData = Field(description="The pictures and masks, with their split.")

    @property
    def dataset(self) -> MaskData:
        """See `_Dense`."""
        return self.data

    @property
    def chosen_by(self) -> tuple[str, Better]:
        """See `TaskSettings`."""
        return "mean_iou", "more"

    def head_params(self, dim: int) -> int:
        """See `TaskSettings`. How many classes there are is not known before masks are read: about 150."""
        return self._head_params(dim, 150)

    def labelled(self, index: ImageIndex, splits: Splits, where: str) -> Labelled:
        """See `TaskSettings`: classes are the numbers in the masks of the training split.

        Raises:
            UserError: one class only, or classes that the training split lacks.
        """
        import numpy as np

        pictures = self.pictures()
        found: dict[str, set[int]] = {}
        for name in _SPLITS:
            rows = getattr(splits, name).tolist()
            found[name] = {int(each) for row in rows for each in np.unique(pictures.target(row))} - {-1}
        numbers = sorted(found["train"])
        if len(numbers) < 2:
            raise UserError(
                f"the masks of the training split have only the class {numbers[0]}"
                if numbers
                else "no pixel of the masks of the training split counts",
                where=f"{where}.task.data",
                hint=f"masks hold the number of a class in each pixel; {self.data.ignored} does not count",
            )
        for name in _SPLITS[1:]:
            if unseen := sorted(found[name] - found["train"]):
                raise UserError(
                    f"masks of {name} have classes that those of train lack: "
                    f"{shortened(', '.join(map(str, unseen)), 200)}",
                    where=f"{where}.task.data.split",
                    hint="put pictures of each class into train, give the split another `seed`, or set `ignore`",
                )
        return Labelled(splits.train, splits.validation, splits.test, tuple(map(str, numbers)))

    def annotations(self, index: ImageIndex, classes: Sequence[str]) -> Annotations:
        """See `TaskSettings`."""
        from orchestrator.data.labelled_blocks import PixelClasses

        return PixelClasses(self.pictures(), [int(name) for name in classes])

    def goal(self, classes: Sequence[str]) -> Goal:
        """See `TaskSettings`."""
        from orchestrator.stages.finetune.dense_goals import SegmentationGoal

        return SegmentationGoal(len(classes), **self.shape)

    def record(self) -> dict[str, Any]:
        """See `TaskSettings`."""
        return {"type": self.type, **self.shape}


class Depth(_Dense):
    """The distance of every pixel in metres; the loss is the scale-invariant error of its logarithm."""

    type: Literal["depth"] = Field(description="The name of the task, depth.")
    data: DepthData = Field(description="The pictures and depth maps, with their split.")
    nearest: float = Field(0.1, gt=0, le=1000, description="The nearest depth that is predicted, in metres.")
    num_bins: int | None = Field(
        64,
        ge=2,
        le=4096,
        description="The number of bins between `nearest` and `max_depth` of the data, equally wide in the logarithm; "
        "a depth is their mean, weighted by a softmax. null predicts the logarithm itself.",
    )
    scale_invariance: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The weight of the scale-invariant term of the loss (arXiv 1406.2283, equation 4: 0.5), from 0 to "
        "1. With 1, a common factor on all depths of an image adds nothing to the loss; with 0, the loss is the plain "
        "squared error of the logarithm.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Depth:
        if self.nearest >= self.data.max_depth:
            raise ValueError(f"nearest {self.nearest:g} is not below max_depth {self.data.max_depth:g}")
        return self

    @property
    def dataset(self) -> DepthData:
        """See `_Dense`."""
        return self.data

    @property
    def chosen_by(self) -> tuple[str, Better]:
        """See `TaskSettings`."""
        return "rmse", "less"

    def head_params(self, dim: int) -> int:
        """See `TaskSettings`."""
        return self._head_params(dim, self.num_bins or 1)

    def labelled(self, index: ImageIndex, splits: Splits, where: str) -> Labelled:
        """See `TaskSettings`."""
        return Labelled(splits.train, splits.validation, splits.test)

    def annotations(self, index: ImageIndex, classes: Sequence[str]) -> Annotations:
        """See `TaskSettings`."""
        from orchestrator.data.labelled_blocks import PixelDepths

        return PixelDepths(self.pictures())

    def goal(self, classes: Sequence[str]) -> Goal:
        """See `TaskSettings`."""
        from orchestrator.stages.finetune.dense_goals import DepthGoal

        record = self.record()
        del record["type"]
        return DepthGoal(invariance=self.scale_invariance, **record)

    def record(self) -> dict[str, Any]:
        """See `TaskSettings`."""
        return {
            "type": self.type,
            "nearest": float(self.nearest),
            "farthest": float(self.data.max_depth),
            "num_bins": self.num_bins,
            **self.shape,
        }
