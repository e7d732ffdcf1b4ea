"""From the export of a trained `finetune` job to a model folder with its head."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from orchestrator.fsio import replacing
from orchestrator.models import save_pretrained
from orchestrator.models.lora import merge_lora
from orchestrator.models.wrapped_backbone import WrappedBackbone, save_wrapped
from orchestrator.stages.common.predictor import HEAD
from orchestrator.stages.finetune.start import StartingBackbone
from orchestrator.stages.finetune.task import prepared
from orchestrator.training.export import load_export

if TYPE_CHECKING:
    from orchestrator.config.pixels import PixelFormat
    from orchestrator.stages.finetune.config import Finetune


def save_finetuned(
    config: Finetune,
    start: StartingBackbone,
    classes: Sequence[str],
    export: Path,
    folder: Path,
    pixels: PixelFormat | None = None,
) -> dict[str, float]:
    """The backbone of an export with its adapters merged, and its head, as one folder of weights.

    `orchestrator.load` reads it as any backbone; with its head it predicts.

    Args:
        config: the stage's.
        start: what training started from: what is not in the export is as it was there.
        classes: of the head.
        export: of the job.
        folder: made if missing.
        pixels: how the index says that files are seen; mean and deviation are those of the backbone.

    Returns:
        How many weights were trained, and how many of these are the head's.
    """
    backbone = prepared(start.open(), config)
    trained = dict(load_export(export, "backbone."))
    found = backbone.load_state_dict(trained, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    merge_lora(backbone)
    backbone.eval()
    record = json.loads((start.folder / "config.json").read_text(encoding="utf-8"))
    extra: dict[str, Any] = {
        "image_size": start.image_size,
        "head": {**config.task.record(), "classes": list(classes)},
    }
    told = {} if pixels is None else pixels.record()
    seen = {**told, "mean": record["mean"], "std": record["std"]}
    if isinstance(backbone, WrappedBackbone):
        save_wrapped(folder, backbone, extra, seen)
    else:
        # The folder's own config, so that what training alone changes (drop-path) is not taken for the model's.
        save_pretrained(folder, backbone.state_dict(), record["preset"], extra, _overrides(record), seen)
    head = {name: tensor.contiguous() for name, tensor in load_export(export, "head.").items()}
    with replacing(folder / HEAD) as draft:
        save_file(head, draft, {"format": "pt"})
    sizes = {"head": sum(tensor.numel() for tensor in head.values())}
    return {
        "trained_parameters": float(sizes["head"] + sum(tensor.numel() for tensor in trained.values())),
        "head_parameters": float(sizes["head"]),
    }


def _overrides(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in which a model's config differs from its preset."""
    import dataclasses

    from orchestrator.models import preset
    from orchestrator.models.pretrained import read_config

    ours, known = read_config(record), preset(record["preset"])
    return {
        field.name: getattr(ours, field.name)
        for field in dataclasses.fields(ours)
        if getattr(ours, field.name) != getattr(known, field.name, None)
    }
