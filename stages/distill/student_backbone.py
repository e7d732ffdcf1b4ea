"""A student's backbone: one of ours by name, or a network from elsewhere, and what is left of the latter."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.blocks import CropBlocks
from orchestrator.data.rng import derive
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError
from orchestrator.models import normalise
from orchestrator.models.network_spec import NetworkSpec
from orchestrator.models.wrapped_backbone import (
    WrappedBackbone,
    build_wrapped,
    measure_batch_norms,
    ready_to_train,
    save_wrapped,
)
from orchestrator.stages.common.backbone import see_pixels
from orchestrator.stages.common.nets import flat_views
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.student_config import Student
from orchestrator.training.device import device
from orchestrator.training.export import load_export

logger = logging.getLogger("orchestrator")

# Images from which BatchNorm's statistics are measured; as many as whitening takes by default.
NORM_IMAGES = 512
_NAMED = 3


def backbone_of(config: Distill, student: Student, seed: int) -> str | WrappedBackbone:
    """What a student's modules are built on: the name of a model, or a network with the weights that the seed makes.

    Args:
        config: the stage's.
        student: one of its students.
        seed: the student's.

    Raises:
        UserError: the network cannot be built or trained on this machine; where the stage was checked, it could.
    """
    spec = student.network
    if spec is None:
        assert student.model is not None
        return student.model
    crops = config.crops_of(student)
    locals_too = config.features is None or config.features.local_weight > 0
    try:
        backbone = _built(spec, crops, seed)
        frozen = ready_to_train(backbone, *((crops.local_size,) if locals_too and crops.num_local else ()))
    except ValueError as error:
        hint = "a module has to be on PYTHONPATH, or its package installed, on all machines"
        raise UserError(f"{spec}: {error}", where=spec.library, hint=hint) from error
    if frozen:
        more = f" and {len(frozen) - _NAMED} more" if len(frozen) > _NAMED else ""
        logger.info("%s: its features do not depend on %s%s", spec, ", ".join(frozen[:_NAMED]), more)
    return backbone


def save_network(
    config: Distill,
    student: Student,
    seed: int,
    pixels: PixelFormat | None,
    views: Callable[[], CropBlocks],
    export: Path,
    folder: Path,
) -> None:
    """A trained network from elsewhere in `folder/model`, and what it was built from in `folder/recipe.json`.

    Args:
        config: the stage's.
        student: of it.
        seed: the student's: what is not trained is as it was built.
        pixels: how the photographs are seen.
        views: makes those of the student, to measure what its BatchNorms need; on this process's device.
        export: the weights.
        folder: of the student's artifact.
    """
    spec, crops = student.network, config.crops_of(student)
    assert spec is not None
    where = device()
    backbone = _built(spec, crops, seed)
    see_pixels(backbone, pixels)
    found = backbone.net.load_state_dict(dict(load_export(export, "backbone.net.")), strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    if measure_batch_norms(backbone.to(where), _batches(views(), where, backbone)):
        logger.info("%s: BatchNorm was measured on the first %d images", spec, NORM_IMAGES)
    told = None if pixels is None else pixels.record()
    save_wrapped(folder / "model", backbone.cpu(), pixels=told)
    recipe = {
        "model": None,
        spec.library: spec.name,
        "kwargs": dict(spec.kwargs),
        "global_size": crops.global_size,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1))


def _built(spec: NetworkSpec, crops: CropConfig, seed: int) -> WrappedBackbone:
    return build_wrapped(spec, crops.global_size, derive(seed, "network") % 2**63)


def _batches(views: CropBlocks, device: str, tower: WrappedBackbone) -> Iterator[Tensor]:
    """The global crops of the first steps, normalised, a block at a time as in training."""
    num_images = 0
    for step in count():
        for index in range(views.num_blocks):
            block = views.load(step, index)
            yield normalise(flat_views(torch.from_numpy(block.arrays["globals"])).to(device), tower)
            num_images += len(block.ids)
        if num_images >= NORM_IMAGES:
            return
