"""What a metric is: settings as typed fields, and a method that gives the figures of one model. One class is a metric.

`evaluate` has some of its own, each in a file of `evaluation/metrics/`; users' packages bring others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pydantic import Field

from orchestrator.config.extension import Extension
from orchestrator.config.split import SPLITS
from orchestrator.installed import Group

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TITLE = (
    "The name of the metric's figures in results. Default: the name in `use`, after its colon if it has one."
)
LEAVE_ONE_OUT = "leave-one-out"


@dataclass(frozen=True)
class Figure:
    """A figure, and how sure it is.

    Attributes:
        value: the figure.
        low, high: the ends of its 95 % interval; None where there is none.
        split: of which pictures it is: `test`, or `leave-one-out` where each is judged by all others.
        num: how many pictures that are.
        note: what was chosen for it, such as `k=20`.
    """

    value: float
    low: float | None = None
    high: float | None = None
    split: str = ""
    num: int = 0
    note: str = ""

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


# Boxes, scores and places of classes.
FoundBoxes: TypeAlias = "tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]], NDArray[np.int64]]"
Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class Features:
    """What one model makes of the photos: of all that take part in the k-NN, or of all where no photo has a label.

    Attributes:
        model: its name in the report, such as `pretrain, step 36 (teacher)`.
        family: `backbone`, `student`, `random weights`, or `baseline` for raw pixels.
        cls_ND: float32, the CLS feature of each photo, not normalised.
        labels: of each photo; None where it has none.
        photos: the name of each, `source/path`.
        seed: the pipeline's; draw from it what is random.
        patches: computes the patch features, float32 (N, P, D), P in the order of rows.
        splits: by the split's name the rows of `cls_ND` that are in it; empty where the stage has no `split`.
        size: the side in pixels at which the model sees photos.
        at_scale: the CLS features of all photos at this multiple of `size`, float32 (N, D); None if the model does not
            take that size.
        maps: patch features of square images of one side, uint8 (B, S, S, 3), as float32 (B, h, w, D); `S` must be a
            multiple of `patch`.
        patch: the side in pixels of what one patch feature is of.
        boxes: finds objects in square images as in `maps`; of each image boxes (Q, 4) as corners in shares of it, their
            scores (Q,) and places in `classes` (Q,). None of a model without a head for that.
        classes: that a fine-tuned model learned, in the order of its outputs.
        check: called now and then; raises to stop.
    """

    model: str
    family: str
    cls_ND: NDArray[np.float32]
    labels: Sequence[str | None]
    photos: Sequence[str]
    seed: int
    patches: Callable[[], NDArray[np.float32]]
    splits: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    size: int = 0
    at_scale: Callable[[float], NDArray[np.float32] | None] | None = None
    maps: Callable[[NDArray[np.uint8]], NDArray[np.float32]] | None = None
    patch: int = 1
    boxes: Callable[[NDArray[np.uint8]], Sequence[FoundBoxes]] | None = None
    classes: Sequence[str] = ()
    check: Callable[[], None] = lambda: None


class Metric(Extension):
    """Base of metrics: fields are settings, :meth:`measure` gives the figures.

    Attributes:
        needs_labels: whether photos without labels give nothing; `evaluate` then says so before it embeds any.
        needs_split: whether it learns something, so that `evaluate` must have a `split`.
        of_pixels: whether it is computed of raw pixels, too, as a baseline.
        needs_head: the task of `finetune` that a model must have learned; others have no row.
        has_photos: whether it reads photos of its own, which have red, green and blue.
    """

    group: ClassVar[Group] = "metrics"
    method: ClassVar[str] = "measure"
    builtin: ClassVar[Mapping[str, str]] = {
        name: f"orchestrator.evaluation.metrics.{module}:{name_of_class}"
        for name, (module, name_of_class) in {
            "knn": ("knn", "Knn"),
            "linear_probe": ("linear_probe", "LinearProbe"),
            "image_retrieval": ("image_retrieval", "ImageRetrieval"),
            "size_robustness": ("size_robustness", "SizeRobustness"),
            "linear_segmentation": ("segmentation", "LinearSegmentation"),
            "linear_depth": ("depth", "LinearDepth"),
            "correspondence": ("correspondence", "Correspondence"),
            "detection": ("detection", "DetectionPrecision"),
            "correspondence_3d": ("correspondence_3d", "Correspondence3d"),
        }.items()
    }
    needs_labels: ClassVar[bool] = False
    needs_split: ClassVar[bool] = False
    of_pixels: ClassVar[bool] = False
    needs_head: ClassVar[str | None] = None
    has_photos: ClassVar[bool] = False

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_ .\-]*$", description=TITLE)

    @property
    def title(self) -> str:
        """The name of its figures."""
        return self.name or self.use.rpartition(":")[2]

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Files that fields name, by dotted field: they must be there, and their content is part of the key."""
        return {}

    def check(self) -> None:
        """Look, before anything runs, at the data that the fields name.

        Raises:
            UserError: `where` is the dotted field that is wrong.
        """

    def is_fair(self, learned: Any) -> bool:
        """Whether the test pictures are none that a model was fine-tuned on.

        Args:
            learned: the data set of the fine-tuning, with its split.
        """
        return True

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """The figures of one model by name; a name stays the same for all models. None is no row."""
        raise NotImplementedError

    def picture(self, path: Path) -> bool:
        """Draw what the model that was measured last makes of a few pictures, as a PNG; False if nothing is drawn."""
        return False

    def floor(self, features: Features) -> tuple[str, Mapping[str, float | Figure]] | None:
        """What an answer gets that looks at no picture, and what to call it; None if that says nothing.

        Args:
            features: of any model: its features are not looked at.
        """
        return None


def checked(metric: Metric, found: Any) -> dict[str, Figure]:
    """What a metric gave. The name of a figure of one split begins with that: `test_accuracy`.

    Raises:
        TypeError: it is not a mapping of names to numbers.
    """
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise TypeError(
            f"{metric.use}.measure gave {type(found).__name__}, not a mapping of names to numbers"
        )
    figures = {
        name: value if isinstance(value, Figure) else Figure(float(value)) for name, value in found.items()
    }
    return {f"{one.split}_{name}" if one.split in SPLITS else name: one for name, one in figures.items()}
