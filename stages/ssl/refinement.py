"""What `gram_anchor` and `high_res` share: they go on from a backbone's stage, or from weights with new heads."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from orchestrator.config.settings import in_key_if_set
from orchestrator.errors import KeyMistakeError, UserError
from orchestrator.stages.base import Input, PlanContext
from orchestrator.stages.common.config import BACKBONE_KINDS, INDEX_KINDS, READ_BY_WORKERS, Heads
from orchestrator.stages.ssl.config import SelfSupervised
from orchestrator.stages.ssl.gram import Gram


class Refinement(SelfSupervised):
    """A stage that makes a trained backbone better."""

    gram: Gram = Field(Gram(), description="The settings of Gram anchoring.")
    heads: Heads | None = in_key_if_set(
        None,
        description="The sizes of the DINO and iBOT heads, which are new with `from`. Default: as in `pretrain`. "
        "Without `from` the heads are those of the stage under `needs`.",
    )
    drop_path: float | None = in_key_if_set(
        None,
        ge=0,
        lt=1,
        description="The drop-path rate with `from`: the share of a batch's samples that each residual branch skips, "
        "from 0 to below 1. Default: 0. Without `from` it is that of the stage under `needs`.",
    )

    inputs: ClassVar[tuple[Input, ...]] = (
        Input("index", INDEX_KINDS),
        Input("backbone", BACKBONE_KINDS, uncompared=READ_BY_WORKERS),
    )

    @model_validator(mode="after")
    def _new_heads(self) -> Refinement:
        for key in ("heads", "drop_path"):
            if self.from_ is None and getattr(self, key) is not None:
                raise KeyMistakeError(
                    f"{key} is that of the stage under `needs`", key=key, hint="leave it out, or set `from`"
                )
        return self

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: a Gram teacher that is not there."""
        alone = self.from_ is not None and "backbone" not in plan_context.upstream
        if alone and self.gram.teacher not in ("earliest", "latest", "start"):
            return [
                UserError(
                    f"there is no snapshot {self.gram.teacher!r}: the stage starts from weights alone",
                    where="gram.teacher",
                    hint="leave it out: the weights of `from` are the Gram teacher",
                )
            ]
        return super().preflight(plan_context)

    def _heads(self) -> Heads:
        return self.heads or Heads()

    def _drop_path(self) -> float:
        return self.drop_path or 0.0
