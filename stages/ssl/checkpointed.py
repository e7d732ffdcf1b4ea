"""The backbone of a self-supervised stage, out of one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.stages.base import Context
from orchestrator.stages.common.checkpointed import (
    CheckpointedModel,
    ReadWeights,
    shapes_of,
    write_export,
)

if TYPE_CHECKING:
    from orchestrator.stages.ssl.config import SelfSupervised


def checkpointed_backbone(config: SelfSupervised, context: Context) -> CheckpointedModel:
    """The EMA backbone; its folder is what the stage leaves of it after its last step.

    Raises:
        UserError: it is not known which model is trained.
    """
    recipe = config.recipe(context)

    def write(read: ReadWeights, folder: Path) -> None:
        from orchestrator.models import build
        from orchestrator.stages.common.backbone import save_backbone

        shapes = shapes_of(build(recipe.model, **recipe.model_overrides))
        export = folder.with_name(f"{folder.name}.safetensors")
        write_export(read, {"backbone.": shapes}, export)
        size = config.crops_at(0, 0).global_size
        save_backbone(export, recipe.model, folder, size, recipe.model_overrides, recipe.pixels)
        export.unlink()

    return CheckpointedModel(config.steps, config.models()[""], write)
