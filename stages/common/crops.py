"""The multi-crop blocks of a stage, from a curated index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from orchestrator.data.blocks import CropBlocks
from orchestrator.data.curation.mix import held_out_order
from orchestrator.data.index import ImageIndex
from orchestrator.data.resized_images import ResizedImages
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.views import CropConfig
from orchestrator.stages.common.config import ModelRecipe


class CropStage(Protocol):
    """A stage that trains on multi-crop views."""

    @property
    def batch_size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def crops(self) -> CropConfig: ...
    @property
    def mask_ratio(self) -> tuple[float, float]: ...
    @property
    def mask_probability(self) -> float: ...
    @property
    def max_unreadable(self) -> float: ...
    @property
    def cached_side(self) -> int | None: ...
    @property
    def image_cache_gib(self) -> float: ...

    def crops_at(self, step: int, seed: int) -> CropConfig: ...
    def sample_order(self, index: ImageIndex, batch_size: int, seed: int) -> SampleOrder: ...


def crop_blocks(
    config: CropStage,
    recipe: ModelRecipe | None,
    index_folder: Path,
    seed: int,
    crops: CropConfig | None = None,
    *,
    roots: Mapping[str, str] | None = None,
    held_out: bool = False,
) -> CropBlocks:
    """Views, and masks on the grid of the recipe's model: the backbone, or the teacher that students learn from.

    Args:
        config: the stage.
        recipe: None for views without masks.
        index_folder: the photographs.
        seed: of the stage.
        crops: other views than the stage's, of the same boxes.
        roots: where the datasets are, see :meth:`ImageIndex.load`.
        held_out: of the photographs that nobody trains on, instead of those that the stage draws.
    """
    index = ImageIndex.load(index_folder, roots)
    order = (
        held_out_order(index, batch_size=config.batch_size, seed=seed)
        if held_out
        else config.sample_order(index, config.batch_size, seed)
    )
    return CropBlocks(
        index,
        order,
        lambda step: crops or config.crops_at(step, seed),
        patch_size=recipe.tower.patch_size if recipe is not None else None,
        block_size=config.block_size,
        seed=seed,
        mask_ratio=config.mask_ratio,
        mask_probability=config.mask_probability,
        like=config.crops if crops is not None else None,
        max_unreadable=config.max_unreadable,
        resized=ResizedImages.opened(config.cached_side, config.image_cache_gib),
    )
