"""The head of a fine-tuned model: what `finetune` leaves beside the backbone, and what predictions are made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.models.predictors import head_of
from orchestrator.models.vit import BackboneFeatures

HEAD = "head.safetensors"


class Predictor(NamedTuple):
    """A head, in eval mode.

    Attributes:
        head: called with features and the size of the images.
        task: its type, such as `classification`.
        classes: of its outputs, in their order; empty for a task without classes.
    """

    head: nn.Module
    task: str
    classes: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, features: BackboneFeatures, size: tuple[int, int]) -> Tensor:
        """Raw predictions of features of images of `size`, such as logits."""
        predictions: Tensor = self.head(features, size)
        return predictions


def load_predictor(folder: Path, dim: int) -> Predictor | None:
    """The head in a model folder, on the CPU; None if it has none.

    Args:
        folder: of a model.
        dim: width of the backbone's features.

    Raises:
        ValueError: of another version, or weights and description do not fit.
    """
    if not (folder / HEAD).is_file():
        return None
    record: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described = (record.get("extra") or {}).get("head")
    if not isinstance(described, Mapping):
        raise ValueError(f"{folder} has {HEAD}, but its config.json describes no head")
    names = described.get("classes", [])
    if not isinstance(names, list):
        raise ValueError(f"`classes` of the head is {names!r:.40}; it must be a list")
    classes = tuple(str(name) for name in names)
    # Without memory until the weights are seen to be of its shapes.
    with torch.device("meta"):
        head = head_of(described, dim, len(classes))
    try:
        head.load_state_dict(load_file(folder / HEAD), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{HEAD} does not fit its description: {str(error).splitlines()[-1].strip()}"
        ) from error
    return Predictor(head.float().eval(), str(described["type"]), classes)
