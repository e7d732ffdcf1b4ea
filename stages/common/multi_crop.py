"""What self-supervised stages and distillation have in common: multi-crop views, and the losses on them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from orchestrator.config.schedules import Optimizer, Share, check_ratio
from orchestrator.config.settings import operational
from orchestrator.data.views import CropConfig
from orchestrator.stages.common.config import PRECISION, KoLeoViews, Precision, check_blocks, check_group
from orchestrator.stages.common.mixing import HomogeneousMixStage
from orchestrator.stages.common.step_fields import OPTIMIZER, STEPS, batch_size_field, block_size_field


class MultiCropStage(HomogeneousMixStage):
    """DINO, iBOT and KoLeo over multi-crop views (arXiv 2508.10104, section 3.2), whatever the targets come from."""

    steps: int = STEPS
    batch_size: int = batch_size_field()
    block_size: int = block_size_field(least=2)
    crops: CropConfig = Field(
        CropConfig(), description="The sizes and augmentations of global and local crops."
    )
    optimizer: Optimizer = OPTIMIZER
    student_temperature: float = Field(
        0.1,
        gt=0,
        description="The temperature of the student's softmax in the DINO and iBOT losses (DINOv3's published code: "
        "0.1).",
    )
    ibot_weight: float = Field(1.0, ge=0, description="The weight of the iBOT loss (DINOv3, section 3.2: 1).")
    koleo_weight: float = Field(
        0.1, ge=0, description="The weight of the KoLeo loss (DINOv3, section 3.2: 0.1)."
    )
    koleo_views: KoLeoViews = Field(
        "first",
        description="The global crops that the KoLeo loss is computed on: first, as in the DINOv3 paper, or both, with "
        "the sum of both losses, as in DINOv3's published code.",
    )
    koleo_group: int | None = Field(
        None,
        ge=2,
        description="The number of images in a KoLeo group: the nearest neighbour of each image is searched within its "
        "group. It must divide `block_size`. Default: 16 (DINOv3, section 3.2), or `block_size` if that is smaller.",
    )
    mask_ratio: tuple[Share, Share] = Field(
        (0.1, 0.5),
        description="The minimum and maximum share of masked patches in a masked global crop, from 0 to 1 (DINOv3's "
        "published code: 0.1 and 0.5).",
    )
    mask_probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The share of global crops that are masked, from 0 to 1 (DINOv3's published code: 0.5).",
    )
    precision: Precision = PRECISION
    chunk_rows: int | None = operational(
        None,
        ge=1,
        description="The maximum number of rows whose logits are in memory at once. A change alters results in their "
        "last bits, even with `elastic.exact`, but runs no stage again. Default: all rows of a block.",
    )

    @model_validator(mode="after")
    def _blocks_and_masks_fit(self) -> Self:
        check_blocks(self, self.batch_size, self.block_size)
        check_group(self.koleo_group, self.block_size)
        check_ratio("mask_ratio", self.mask_ratio)
        return self
