"""The labelled blocks of a `finetune` stage, from a curated index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.index import ImageIndex
from orchestrator.data.labelled_blocks import LabelledBlocks, SplitBlocks
from orchestrator.data.resized_images import ResizedImages
from orchestrator.data.sampler import SampleOrder
from orchestrator.stages.finetune.goal import Labelled

if TYPE_CHECKING:
    from orchestrator.stages.finetune.config import Finetune


def training_blocks(
    config: Finetune,
    index_folder: Path,
    labelled: Labelled,
    size: int,
    seed: int,
    *,
    roots: Mapping[str, str] | None = None,
) -> LabelledBlocks:
    """Random crops of the training split, drawn by their weights.

    `roots` says where the datasets are, see :meth:`ImageIndex.load`.
    """
    index = ImageIndex.load(index_folder, roots)
    return LabelledBlocks(
        index,
        SampleOrder(
            {"train": labelled.train},
            batch_size=config.batch_size,
            seed=seed,
            row_weights=index.weights,
        ),
        config.task.annotations(index, labelled.classes),
        size=size,
        block_size=config.block_size,
        seed=seed,
        scale=config.crop_scale,
        flip=config.flip,
        max_unreadable=config.max_unreadable,
        resized=ResizedImages.opened(config.cached_side, config.image_cache_gib),
    )


def split_blocks(
    config: Finetune,
    index_folder: Path,
    labelled: Labelled,
    name: str,
    size: int,
    *,
    roots: Mapping[str, str] | None = None,
) -> SplitBlocks:
    """All images of a split, by its name."""
    index = ImageIndex.load(index_folder, roots)
    return SplitBlocks(
        index,
        getattr(labelled, name).tolist(),
        config.task.annotations(index, labelled.classes),
        size=size,
        block_size=config.block_size,
    )
