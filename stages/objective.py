"""Objectives of users' packages: loss terms of the self-supervised stages, beside their own. One class is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, SerializeAsAny

from orchestrator.config.extension import Chosen, Extension
from orchestrator.installed import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StudentOutput:
    """What the student makes of the global crops of one block, with gradients, in the precision of training.

    Attributes:
        cls_GBD: the CLS feature of each crop: G crops of B images.
        patches_GBPD: the patch features, P in the order of rows.
        masks_GBP: whether a patch was hidden from the student.
        step: 0-based.
    """

    cls_GBD: Tensor
    patches_GBPD: Tensor
    masks_GBP: Tensor
    step: int


class Objective(Extension):
    """Base of objectives: fields are settings, :meth:`loss` gives the term, which is the same on any worker."""

    group: ClassVar[Group] = "objectives"
    method: ClassVar[str] = "loss"

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$",
        description="The name of the term in curves. Default: the name in `use`, after its colon if it has one.",
    )
    weight: float = Field(1.0, ge=0, description="The weight of the term in the loss.")

    @property
    def title(self) -> str:
        """The name of the term."""
        return self.name or self.use.rpartition(":")[2]

    def loss(self, output: StudentOutput) -> Tensor:
        """The term of one block, a scalar: a mean over its images. It is weighted elsewhere.

        A step's loss is the mean over its blocks, so the term must not depend on other blocks, and what is random in
        it must follow from the step alone.
        """
        raise NotImplementedError


OwnObjective = Annotated[SerializeAsAny[Objective], Chosen(Objective)]
