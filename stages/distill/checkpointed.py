"""The students of a distillation, each out of one of its own checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.fsio import move
from orchestrator.stages.base import Context
from orchestrator.stages.common.checkpointed import (
    CheckpointedModel,
    ReadWeights,
    shapes_of,
    write_export,
)
from orchestrator.stages.common.config import ModelRecipe, stage_seed

if TYPE_CHECKING:
    from orchestrator.config.pixels import PixelFormat
    from orchestrator.stages.distill.config import Distill

# The folder of the model in a student's own artifact.
_MODEL = "model"


def checkpointed_students(config: Distill, context: Context) -> Mapping[str, CheckpointedModel]:
    """The EMA of each student; its folder is what the stage leaves of it after its last step."""
    from orchestrator.data.index import pixels_in

    identities = {name: config.student_identity(name) for name in config.students}
    config = config.seeing(pixels_in(context.inputs["index"].path))
    return {
        name: CheckpointedModel(
            config.steps_of(student),
            _MODEL,
            partial(_write, config, context, name),
            piece=("student", identities[name]),
        )
        for name, student in config.students.items()
    }


def _write(config: Distill, context: Context, name: str, read: ReadWeights, folder: Path) -> None:
    from orchestrator.models import build
    from orchestrator.stages.common.backbone import save_backbone

    student = config.students[name]
    export = folder.with_name(f"{folder.name}.safetensors")
    if student.model is None:
        _write_network(config, context, name, read, folder, export)
    else:
        shapes = shapes_of(build(student.model, **student.model_overrides))
        write_export(read, {"backbone.": shapes}, export)
        size, pixels = config.crops_of(student).global_size, _pixels(config, context)
        save_backbone(export, student.model, folder, size, student.model_overrides, pixels)
    export.unlink()


def _write_network(
    config: Distill, context: Context, name: str, read: ReadWeights, folder: Path, export: Path
) -> None:
    from orchestrator.data.rng import derive
    from orchestrator.models.wrapped_backbone import build_wrapped
    from orchestrator.stages.distill.step_views import regenerated_views
    from orchestrator.stages.distill.student_backbone import save_network

    student = config.students[name]
    spec, crops, seed = student.network, config.crops_of(student), stage_seed(context, config.kind)
    assert spec is not None
    shapes = shapes_of(build_wrapped(spec, crops.global_size, 0).net)
    write_export(read, {"backbone.net.": shapes}, export)
    index = context.inputs["index"].path
    views = partial(regenerated_views, config, index, seed, crops, roots=context.roots)
    made = folder.with_name(f"{folder.name}-made")
    save_network(config, student, derive(seed, name), config.pixels, views, export, made)
    # What is lost of it is made again.
    move(made / _MODEL, folder, durable=False)


def _pixels(config: Distill, context: Context) -> PixelFormat | None:
    """How a student sees pictures: as its teacher with heads does, unless that sees other bands."""
    if config.features is not None or config.teacher_bands is not None:
        return config.pixels
    recipe = (context.inputs["teacher"].path / "recipe.json").read_text()
    return ModelRecipe.model_validate_json(recipe).pixels
