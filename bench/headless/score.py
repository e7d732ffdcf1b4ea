"""k-NN of what towers and raw pixels say of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bench.headless.train import SIZE, TEACHER_SIZE
from bench.learning import measure, sets
from orchestrator.data.index import ImageRecord
from orchestrator.evaluation.metrics.knn import knn_leave_one_out, knn_vote
from orchestrator.models import Backbone, efficientnet, normalise
from orchestrator.models.wrapped import open_module

SETS = ("food", "stamps")
OWN_SIZE = 224
_RAW = 32
_BATCH = 32

Look = Callable[[Tensor], Tensor]
Scores = dict[str, dict[str, list[float]]]
"""Who → way of asking → a value a seed."""


@dataclass(frozen=True)
class Exam:
    """The pictures of a set whose groups are large enough: uint8 (N, 3, H, W), labels, and which were held out."""

    images: NDArray[np.uint8]
    labels: list[str]
    held: NDArray[np.bool_]

    def score(self, look: Look) -> dict[str, float]:
        """5-NN by cosine: each picture by all others, and held-out pictures by the training ones."""
        images = torch.from_numpy(self.images)
        with torch.no_grad():
            rows = torch.cat([look(images[at : at + _BATCH]) for at in range(0, len(images), _BATCH)])
        features = rows.float().numpy()
        queries = np.flatnonzero(self.held)
        bank = np.flatnonzero(~self.held)
        return {
            "leave one out": knn_leave_one_out(features, self.labels, measure.NEIGHBOURS),
            "held out": _vote(features, self.labels, bank, queries),
        }


def exam(name: str, every: int = 1) -> Exam:
    """The pictures of a set, large enough for all; or some of them."""
    rows = sets.labelled(sets.pictures(name))[::every]
    held = {row.sha256 for row in sets.split(rows)[1]}
    pictures = measure.squares(rows, OWN_SIZE)
    return Exam(pictures.images, pictures.labels, np.array([row.sha256 in held for row in rows]))


def fixed(asked: Exam, weights: Path) -> Scores:
    """What needs no training."""
    lookers = {
        "raw pixels": of_pixels,
        f"teacher at {OWN_SIZE} px": of_teacher(weights, OWN_SIZE),
        f"teacher at {TEACHER_SIZE} px": of_teacher(weights, TEACHER_SIZE),
    }
    return {who: _listed([asked.score(look)]) for who, look in lookers.items()}


def of_towers(asked: Exam, towers: Mapping[str, Sequence[Backbone]]) -> Scores:
    """Each kind of tower, a value a seed."""
    return {
        who: _listed([asked.score(of_student(net, SIZE)) for net in nets]) for who, nets in towers.items()
    }


def training_rows() -> list[ImageRecord]:
    """The pictures to train on: all but the held-out ones, whatever their group."""
    return [row for name in SETS for row in sets.split(sets.pictures(name))[0]]


def of_teacher(weights: Path, size: int) -> Look:
    """The teacher's image feature at a size: the mean of its map."""
    net = open_module("orchestrator.models.efficientnet:lite0", weights, size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (efficientnet.MEAN, efficientnet.STD))
    return lambda images: net((_small(images, size) - mean) / std).cls


def of_student(net: Backbone, size: int) -> Look:
    """A tower's CLS."""
    return lambda images: net(normalise((255 * _small(images, size)).round().to(torch.uint8))).cls


def of_pixels(images: Tensor) -> Tensor:
    """Small pictures as vectors."""
    return _small(images, _RAW).flatten(1)


def _small(images_NCHW: Tensor, size: int) -> Tensor:
    """In 0 to 1, averaged down."""
    x_NCHW = images_NCHW.float() / 255
    return x_NCHW if x_NCHW.shape[-1] == size else F.interpolate(x_NCHW, (size, size), mode="area")


def _listed(scores: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {way: [score[way] for score in scores] for way in scores[0]}


def _vote(
    features: NDArray[np.float32], labels: Sequence[str], bank: NDArray[np.intp], queries: NDArray[np.intp]
) -> float:
    named = np.asarray(labels)
    votes = knn_vote(features[bank], named[bank], features[queries], measure.NEIGHBOURS)
    return float((votes == named[queries]).mean())
