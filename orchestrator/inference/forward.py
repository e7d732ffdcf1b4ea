"""The torch side of inference: squares of pixels through a model, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from orchestrator.data.decode import Pixels
from orchestrator.inference.model import Model
from orchestrator.inference.threads import fitting_threads, flops_of
from orchestrator.models import Backbone, BackboneFeatures, normalise
from orchestrator.models.wrapped_backbone import WrappedBackbone
from orchestrator.stages.common.aligned import Aligned
from orchestrator.training.device import device_type

Floats = NDArray[np.float32]
Tower = Backbone | WrappedBackbone


def tower_of(module: Tower | Aligned) -> Tower:
    """The module that sees images."""
    return module.tower if isinstance(module, Aligned) else module


@torch.inference_mode()
def features_of(tower: Tower, squares: Sequence[Pixels]) -> tuple[Floats, Floats]:
    """CLS (N, D) and patch features (N, P, D) of squares (size, size, 3) uint8 of one size, float32 on the CPU."""
    with _computing(tower, squares):
        features = _forward(tower, squares)
        return features.cls.float().cpu().numpy(), features.patches.float().cpu().numpy()


@torch.inference_mode()
def image_vectors(module: Tower | Aligned, squares: Sequence[Pixels]) -> Floats:
    """Vectors of length 1 of squares (size, size, 3) uint8 of one size: float32 (N, D) on the CPU.

    The CLS feature of a backbone; of a model with a text tower the vector in the space of its texts.
    """
    tower = tower_of(module)
    with _computing(tower, squares):
        features = _forward(tower, squares)
        if isinstance(module, Aligned):
            return module.embed_features(features)
        unit: Floats = normalize(features.cls.float(), dim=-1).cpu().numpy()
        return unit


@torch.inference_mode()
def probabilities_of(model: Model, squares: Sequence[Pixels]) -> Floats:
    """Probabilities (N, C) of the classes of a fine-tuned model, of squares as above; float32 on the CPU."""
    found: Floats = _predictions(model, squares).softmax(dim=-1).cpu().numpy()
    return found


@torch.inference_mode()
def maps_of(model: Model, squares: Sequence[Pixels]) -> NDArray[Any]:
    """Maps (N, size, size) of a fine-tuned model on the CPU: int64 places of classes, or float32 metres."""
    assert model.predictor is not None
    predictions = _predictions(model, squares)
    found = predictions.argmax(dim=1) if model.predictor.task == "segmentation" else predictions.exp()
    made: NDArray[Any] = found.cpu().numpy()
    return made


@torch.inference_mode()
def boxes_of(model: Model, squares: Sequence[Pixels]) -> list[tuple[Floats, Floats, NDArray[np.int64]]]:
    """Of each square the boxes (Q, 4) as corners in shares of it, their scores (Q,) and places of classes (Q,)."""
    from orchestrator.models.detr import detections

    rows = _predictions(model, squares)[:, -1]
    parts = (detections(rows_QK, len(model.classes)) for rows_QK in rows)
    return [
        (boxes.cpu().numpy(), scores.cpu().numpy(), places.cpu().numpy()) for boxes, scores, places in parts
    ]


def _predictions(model: Model, squares: Sequence[Pixels]) -> torch.Tensor:
    """What the head of a fine-tuned model gives of squares, float32."""
    assert model.predictor is not None
    tower, size = tower_of(model.module), (squares[0].shape[0], squares[0].shape[1])
    with _computing(tower, squares):
        out: torch.Tensor = model.predictor.head.to(_device(tower))(_forward(tower, squares), size)
        return out.float()


def on_device(model: Model) -> Model:
    """The model on the GPU that this process may use, if there is one and the model can: pairs of towers cannot."""
    if not isinstance(model.module, Aligned):
        model.module.to(device_type())
    return model


def _forward(tower: Tower, squares: Sequence[Pixels]) -> BackboneFeatures:
    images_NCHW = torch.from_numpy(np.ascontiguousarray(np.stack(squares).transpose(0, 3, 1, 2)))
    features: BackboneFeatures = tower(normalise(images_NCHW.to(_device(tower)), tower))
    return features


def _computing(tower: Tower, squares: Sequence[Pixels]) -> AbstractContextManager[None]:
    """Around all that torch computes of a batch: on a CPU as many of its threads as that is worth."""
    is_on_cpu = _device(tower).type == "cpu"
    return fitting_threads(flops_of(tower, len(squares), squares[0].shape[0]) if is_on_cpu else None)


def _device(tower: Tower) -> torch.device:
    return next(tower.parameters()).device
