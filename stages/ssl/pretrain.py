"""`pretrain`: a backbone from photographs alone, from trained weights, or on from an earlier stage."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.errors import UserError
from orchestrator.stages.base import Context, Input, PlanContext
from orchestrator.stages.common import lineage
from orchestrator.stages.common.config import (
    A_MODEL,
    BACKBONE_KINDS,
    INDEX_KINDS,
    OVERRIDES,
    READ_BY_WORKERS,
    Heads,
    ModelName,
    Overrides,
    check_crops,
    stage_seed,
)
from orchestrator.stages.ssl.config import SelfSupervised
from orchestrator.stages.ssl.gram import StartGram

# Keys of a model that begins here; one that goes on from another stage is as that stage made it.
_OF_A_NEW_MODEL = ("model", "model_overrides", "drop_path", "heads")


class Pretrain(SelfSupervised):
    """Self-supervised pretraining (arXiv 2508.10104, section 3).

    The backbone starts from random weights, from the weights that `from` names, or from the final checkpoint of a
    backbone's stage under `needs`, with its heads and the optimizer's moments.
    """

    kind: Literal["pretrain"]
    model: Annotated[ModelName | None, A_MODEL] = Field(
        None,
        description="The name of the backbone. `orchestrator models` lists them all. Default: the one that the weights "
        "of `from` fit, or that of the stage under `needs`.",
    )
    model_overrides: Overrides = Field({}, description=OVERRIDES)
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The drop-path rate: the share of a batch's samples that each residual branch skips, from 0 to "
        "below 1 (DINOv3's 7B: 0.4).",
    )
    heads: Heads = Field(Heads(), description="The sizes of the DINO and iBOT heads.")
    gram: StartGram | None = Field(
        None,
        description="The settings of Gram anchoring to the backbone that training starts from. Default: there is no "
        "anchoring, as in the first phase of DINOv3's training.",
    )
    resolutions: tuple[()] = Field((), description="Pretraining has one size of crops.")

    inputs: ClassVar[tuple[Input, ...]] = (
        Input("index", INDEX_KINDS),
        Input("backbone", BACKBONE_KINDS, required=False, uncompared=READ_BY_WORKERS),
    )

    @model_validator(mode="after")
    def _crops_fit(self) -> Pretrain:
        if self.model is not None:
            check_crops(self.crops, self.model, self.model_overrides)
        return self

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: no model, or more than one that says what the model is."""
        if found := super().preflight(plan_context):
            return found
        if "backbone" in plan_context.upstream:
            return [
                UserError(
                    f"the model is the one that the stage under `needs` made, so `{key}` cannot be set",
                    where=key,
                    hint=f"leave `{key}` out, or leave that stage out of `needs`",
                )
                for key in _OF_A_NEW_MODEL
                if key in self.model_fields_set
            ]
        if self.from_ is None and self.model is None:
            hint = "add one, such as `model: vit_s`; `orchestrator models` lists them all"
            found.append(UserError("the stage has no `model`", where="kind", hint=hint))
        if self.from_ is None and self.gram is not None:
            what = "there is no trained backbone to anchor to: the backbone starts from random weights"
            found.append(UserError(what, where="gram", hint="set `from`, or leave `gram` out"))
        return found

    def seed_of(self, context: Context) -> int:
        """See :class:`SelfSupervised`: what goes on sees other crops than what it goes on from."""
        backbone = context.inputs.get("backbone")
        if backbone is None:
            return super().seed_of(context)
        return stage_seed(context, f"{self.kind} after {lineage.read(backbone.path).updates} updates")

    def _named_model(self) -> tuple[str | None, dict[str, Any]]:
        return self.model, self.model_overrides

    def _heads(self) -> Heads:
        return self.heads

    def _drop_path(self) -> float:
        return self.drop_path
