"""What a training stage leaves of a model for those who only use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.models import save_pretrained
from orchestrator.training.export import load_export


def save_backbone(
    export: Path,
    model: str,
    folder: Path,
    image_size: int,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """The backbone of an export as a folder that `orchestrator.models.load_pretrained` reads."""
    weights = load_export(export, "backbone.")
    save_pretrained(folder, weights, model, {"image_size": image_size}, overrides)
