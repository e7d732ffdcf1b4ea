"""Metrics of users' packages: figures of every model that `evaluate` scores, beside its own. One class is a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, SerializeAsAny

from orchestrator.config.extension import Chosen, Extension
from orchestrator.installed import Group

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TITLE = "The name of its figures in results. Default: what stands as `use`, after its colon."


@dataclass(frozen=True)
class Features:
    """What one model makes of the photos: of all that take part in the k-NN, or of all where no photo has a label.

    Attributes:
        model: its name in the report, such as `pretrain, step 36 (teacher)` or `student vit-nano`.
        family: `backbone`, `student` or `random weights`.
        cls_ND: float32, the CLS feature of each photo, not normalised.
        labels: of each photo; None where it has none.
        photos: the name of each, `source/path`.
        seed: the pipeline's; draw from it what is random.
        patches: computes the patch features, float32 (N, P, D), P in the order of rows.
    """

    model: str
    family: str
    cls_ND: NDArray[np.float32]
    labels: Sequence[str | None]
    photos: Sequence[str]
    seed: int
    patches: Callable[[], NDArray[np.float32]]


class Metric(Extension):
    """Base of metrics: fields are settings, :meth:`measure` gives the figures."""

    group: ClassVar[Group] = "metrics"
    method: ClassVar[str] = "measure"

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_ .\-]*$", description=TITLE)

    @property
    def title(self) -> str:
        """The name of its figures."""
        return self.name or self.use.rpartition(":")[2]

    def measure(self, features: Features) -> Mapping[str, float]:
        """The figures of one model by name; a name stays the same for all models."""
        raise NotImplementedError


OwnMetric = Annotated[SerializeAsAny[Metric], Chosen(Metric)]


def checked(metric: Metric, found: Any) -> dict[str, float]:
    """What a metric gave, as plain numbers.

    Raises:
        TypeError: it is not a mapping of names to numbers.
    """
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise TypeError(
            f"{metric.use}.measure gave {type(found).__name__}, not a mapping of names to numbers"
        )
    return {name: float(value) for name, value in found.items()}
