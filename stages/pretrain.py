"""`pretrain`: a backbone from nothing but photographs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.stages.base import Context, Input
from orchestrator.stages.selfsup import (
    INDEX_KINDS,
    Heads,
    ModelName,
    ModelRecipe,
    SelfSupervised,
    check_crops,
)


class Pretrain(SelfSupervised):
    """Self-supervised pretraining (arXiv 2508.10104, section 3)."""

    kind: Literal["pretrain"]
    model: ModelName = Field(description="The backbone, by its name in `orchestrator models`.")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="The share of a batch's rows that each residual branch leaves out."
    )
    heads: Heads = Field(Heads(), description="The sizes of the DINO and iBOT heads.")
    gram: None = Field(None, description="Pretraining has no Gram anchoring.")
    resolutions: tuple[()] = Field((), description="Pretraining has one size of crops.")

    inputs: ClassVar[tuple[Input, ...]] = (Input("index", INDEX_KINDS),)

    @model_validator(mode="after")
    def _crops_fit(self) -> Pretrain:
        check_crops(self.crops, self.model)
        return self

    def recipe(self, context: Context) -> ModelRecipe:
        """The model to train, from this config."""
        return ModelRecipe(
            model=self.model, drop_path=self.drop_path, heads=self.heads, global_size=self.crops.global_size
        )
