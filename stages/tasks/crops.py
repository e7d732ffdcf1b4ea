"""The multi-crop blocks of a stage, from a curated index."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.blocks import CropBlocks
from orchestrator.data.index import PhotoIndex
from orchestrator.data.order import SampleOrder
from orchestrator.models.presets import preset
from orchestrator.stages.distill import Distill
from orchestrator.stages.selfsup import ModelRecipe, SelfSupervised


def crop_blocks(
    config: SelfSupervised | Distill, recipe: ModelRecipe, index_folder: Path, seed: int
) -> CropBlocks:
    """Views and masks on the grid of the recipe's model: the backbone, or the teacher that students learn from."""
    index = PhotoIndex.load(index_folder)
    order = SampleOrder(
        {name: index.rows_of(name) for name in sorted(set(index.components))},
        homogeneous=config.homogeneous,
        homogeneous_ratio=config.homogeneous_ratio,
        batch_size=config.batch_size,
        seed=seed,
    )
    return CropBlocks(
        index,
        order,
        lambda step: config.crops_at(step, seed),
        patch_size=preset(recipe.model).patch_size,
        block_size=config.block_size,
        seed=seed,
        mask_ratio=config.mask_ratio,
        mask_probability=config.mask_probability,
    )
