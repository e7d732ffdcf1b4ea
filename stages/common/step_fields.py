"""Fields that training stages share, with the same words: steps, batches, blocks, optimizer, size of images."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from orchestrator.config.schedules import Optimizer

STEPS: int = Field(ge=1, description="The number of optimizer steps.")
OPTIMIZER: Optimizer = Field(description="The settings of AdamW, with its learning rate schedule.")


def batch_size_field(number: str = "The number of images", least: int = 1) -> Any:
    """A `number` per step, at least `least`."""
    return Field(ge=least, description=f"{number} per step, over all workers.")


def block_size_field(number: str = "The number of images", least: int = 1) -> Any:
    """A `number` per block, at least `least`, by default 16."""
    return Field(
        16,
        ge=least,
        description=f"{number} per block, the smallest unit that is assigned to one worker. It must divide "
        "`batch_size`.",
    )


def image_size_field(of: str) -> Any:
    """The side of the images in pixels; by default that which `of`, such as the backbone, was trained at."""
    return Field(
        None,
        description=f"The side of the images, in pixels. Default: the size that the {of} was trained at.",
    )
