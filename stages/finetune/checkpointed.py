"""The model that a fine-tuning trains, out of one of its checkpoints, and its figures on the validation split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import Stopped
from orchestrator.evaluation.metric import Figure
from orchestrator.stages.base import Context
from orchestrator.stages.common.checkpointed import (
    CheckpointedModel,
    ReadWeights,
    shapes_of,
    write_export,
)

if TYPE_CHECKING:
    from orchestrator.config.pixels import PixelFormat
    from orchestrator.stages.finetune.config import Finetune
    from orchestrator.stages.finetune.start import StartingBackbone

_SPLIT = "validation"


def checkpointed_model(config: Finetune, context: Context, scores: str) -> CheckpointedModel:
    """The backbone with its head. Its figures are those by which the stage itself chooses.

    Args:
        config: the stage's.
        context: its pieces are there already, if it has any.
        scores: the file of the artifact that has the step of the finished model.

    Raises:
        UserError: splits that overlap or are empty, or a backbone that is not there.
    """
    from orchestrator.data.index import ImageIndex, pixels_in
    from orchestrator.stages.finetune.blocks import split_blocks
    from orchestrator.stages.finetune.pictures import indexed
    from orchestrator.stages.finetune.run import labelled_rows
    from orchestrator.stages.finetune.score import score_split
    from orchestrator.stages.finetune.start import starting_backbone

    with indexed(config, context) as pictures, starting_backbone(config, context) as start:
        index = ImageIndex.load(pictures.folder, context.roots)
        labelled = labelled_rows(config, context, index)
        seen = pixels_in(pictures.folder)
    blocks = split_blocks(config, pictures.folder, labelled, _SPLIT, start.image_size, roots=context.roots)
    goal = config.task.goal(labelled.classes)

    def write(read: ReadWeights, folder: Path) -> None:
        _write(config, start, labelled.classes, seen, read, folder)

    def check() -> None:
        if context.stop.is_set():
            raise Stopped

    def score(folder: Path) -> dict[str, Figure]:
        found = score_split(goal, blocks, folder, context.elastic.device, context.modules, check)
        count = len(labelled.validation)
        return {f"{_SPLIT}/{name}": Figure(value, split=_SPLIT, num=count) for name, value in found.items()}

    def kept_step(artifact: Path) -> int:
        return int(json.loads((artifact / scores).read_text(encoding="utf-8"))["best_step"])

    return CheckpointedModel(
        config.steps,
        config.models()[""],
        write,
        score=score,
        chosen_by=f"{_SPLIT}/{config.task.chosen_by[0]}",
        kept_step=kept_step,
    )


def _write(
    config: Finetune,
    start: StartingBackbone,
    classes: Sequence[str],
    pixels: PixelFormat | None,
    read: ReadWeights,
    folder: Path,
) -> None:
    from orchestrator.stages.finetune.export import save_finetuned
    from orchestrator.stages.finetune.task import prepared

    backbone = prepared(start.open(), config)
    head = config.task.goal(classes).head(backbone.dim)
    export = folder.with_name(f"{folder.name}.safetensors")
    write_export(read, {"backbone.": shapes_of(backbone), "head.": shapes_of(head)}, export)
    save_finetuned(config, start, classes, export, folder, pixels)
    export.unlink()
