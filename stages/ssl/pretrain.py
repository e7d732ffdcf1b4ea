"""`pretrain`: a backbone from nothing but photographs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.models.configs import Config
from orchestrator.models.presets import preset
from orchestrator.stages.base import Context, Input
from orchestrator.stages.common.config import (
    INDEX_KINDS,
    OVERRIDES,
    Heads,
    ModelName,
    ModelRecipe,
    Overrides,
    check_crops,
)
from orchestrator.stages.ssl.config import SelfSupervised


class Pretrain(SelfSupervised):
    """Self-supervised pretraining (arXiv 2508.10104, section 3)."""

    kind: Literal["pretrain"]
    model: ModelName = Field(description="The name of the backbone. `orchestrator models` lists them all.")
    model_overrides: Overrides = Field({}, description=OVERRIDES)
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The drop-path rate: the share of a batch's samples that each residual branch skips, from 0 to 1.",
    )
    heads: Heads = Field(Heads(), description="The sizes of the DINO and iBOT heads.")
    gram: None = Field(None, description="Pretraining has no Gram anchoring.")
    resolutions: tuple[()] = Field((), description="Pretraining has one size of crops.")

    inputs: ClassVar[tuple[Input, ...]] = (Input("index", INDEX_KINDS),)

    @model_validator(mode="after")
    def _crops_fit(self) -> Pretrain:
        check_crops(self.crops, self.model, self.model_overrides)
        return self

    @property
    def tower(self) -> Config:
        """The shape of the backbone, without drop-path."""
        return preset(self.model, **self.model_overrides)

    def recipe(self, context: Context) -> ModelRecipe:
        """The model to train, from this config."""
        return self.model_recipe()

    def model_recipe(self) -> ModelRecipe:
        """How to build the model that this config describes."""
        return ModelRecipe(
            model=self.model,
            model_overrides=self.model_overrides,
            drop_path=self.drop_path,
            heads=self.heads,
            global_size=self.crops.global_size,
        )
