"""What models are worth on pictures that nobody trained on: k-NN, a linear probe, and a linear map of the foreground.

Nothing is fine-tuned. The probe and the map are logistic regressions of scikit-learn on frozen features of training
pictures; what they are asked about was held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from bench.distil import train
from bench.distil.interval import Asked
from bench.distil.scenes import foreground_scenes
from bench.distil.train import FOCUS, LITE0, MODELS, SIZES, Plan, Weights
from bench.learning import measure, sets
from bench.learning.measure import LabelledImages, Scenes
from orchestrator.evaluation.metrics.knn import knn_vote
from orchestrator.models import Backbone, efficientnet, load_pretrained, normalise
from orchestrator.models.pixels import MEAN, STD
from orchestrator.models.wrapped import open_module, open_transformers

FOREGROUND = "foreground mIoU"
WAYS = tuple(f"{name}, {way}" for name in train.SETS for way in ("k-NN", "linear probe"))
TEACHERS = (f"teacher {FOCUS}", f"teacher {LITE0}")
Scores = dict[str, dict[str, list[Asked]]]
"""Who → way of asking → what came of it, for each seed; of what has no seed once."""
Floats = NDArray[np.float32]

# What teachers see of pictures that they are asked about: the patch of each divides it.
_TEACHER_SIZE = 224
# Raw pixels: of the whole picture half the side, and squares of a grid of eight by eight.
_RAW_SIDE, _RAW_PATCH = 64, 8
_BATCH = 32
_TWICE = 2
_PATCHES = 20_000
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Seen(NamedTuple):
    """Features of pictures: cls (N, D), and patches (N, P, D) of a square grid."""

    cls: Floats
    patches: Floats


class Look(NamedTuple):
    """A frozen model.

    Attributes:
        size: pixels a side of the pictures that it is shown.
        see: uint8 pictures (B, 3, size, size) → CLS and patches.
        map_size: pixels a side where a map is asked for, or 0 for `size`. Students and teachers are shown twice what
            training shows them, as in the maps of `evaluate`.
    """

    size: int
    see: Callable[[Tensor], tuple[Tensor, Tensor]]
    map_size: int = 0

    @torch.no_grad()
    def __call__(self, images_NCHW: NDArray[np.uint8]) -> Seen:
        """Features of pictures of any square size."""
        cls, patches = [], []
        for start in range(0, len(images_NCHW), _BATCH):
            found = self.see(torch.from_numpy(_resized(images_NCHW[start : start + _BATCH], self.size)))
            cls.append(found[0].float().numpy())
            patches.append(found[1].float().numpy())
        return Seen(np.concatenate(cls), np.concatenate(patches))


# --- who is asked -----------------------------------------------------------------------------------------------


def fixed(weights: Weights, plan: Plan) -> Scores:
    """What has no training here: raw pixels, both teachers, and random weights of each model and seed."""
    torch.set_num_threads(1)
    lookers: dict[str, list[Look]] = {
        "raw pixels": [of_pixels()],
        TEACHERS[0]: [of_focus(weights[FOCUS])],
        TEACHERS[1]: [of_lite0(weights[LITE0])],
    }
    for kind, model in MODELS.items():
        nets = [measure.random_net(model, seed) for seed in plan.seeds]
        lookers[f"{kind}, random weights"] = [of_net(net, SIZES[kind]) for net in nets]
    return scored(lookers, plan)


def of_nets(nets: Mapping[str, Sequence[Path]], plan: Plan) -> Scores:
    """Trained models, one for each seed; `KIND, how` → their folders."""
    torch.set_num_threads(1)
    lookers = {
        who: [of_net(load_pretrained(path), SIZES[who.partition(",")[0]]) for path in paths]
        for who, paths in nets.items()
    }
    return scored(lookers, plan)


def of_net(net: Backbone, size: int) -> Look:
    """CLS and patches of a model of ours, of pictures of `size` pixels a side."""

    def see(images: Tensor) -> tuple[Tensor, Tensor]:
        out = net.eval()(normalise(images))
        return out.cls, out.patches

    return Look(size, see, _TWICE * size)


def of_pixels() -> Look:
    """The pixels themselves: of the picture at 32 pixels a side, and of each patch of a grid of eight by eight."""

    def see(images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 255
        small = torch.nn.functional.interpolate(x, (32, 32), mode="area").flatten(1)
        return small, torch.nn.functional.unfold(x, _RAW_PATCH, stride=_RAW_PATCH).transpose(1, 2)

    return Look(_RAW_SIDE, see)


def of_focus(folder: Path, size: int = _TEACHER_SIZE) -> Look:
    """The relative of DINOv2, at `size` pixels a side."""
    net = open_transformers(str(folder), size)
    return Look(size, lambda images: net(_scaled(images, MEAN, STD))[:2])


def of_lite0(weights: Path) -> Look:
    """EfficientNet-Lite0: the mean of its map, and the map."""
    net = open_module("orchestrator.models.efficientnet:lite0", weights, _TEACHER_SIZE)
    return Look(_TEACHER_SIZE, lambda images: net(_scaled(images, efficientnet.MEAN, efficientnet.STD))[:2])


# --- what is asked ----------------------------------------------------------------------------------------------


def scored(lookers: Mapping[str, Sequence[Look]], plan: Plan) -> Scores:
    """Each of them, asked in every way."""
    exams = {name: labelled(name, plan.every) for name in train.SETS}
    scenes = foreground_scenes(plan.scenes)
    found: Scores = {}
    for who, looks in lookers.items():
        ways: dict[str, list[Asked]] = {way: [] for way in (*WAYS, FOREGROUND)}
        for look in looks:
            for name, (bank, queries) in exams.items():
                first, second = look(bank.images).cls, look(queries.images).cls
                ways[f"{name}, k-NN"].append(knn(first, bank.labels, second, queries.labels))
                ways[f"{name}, linear probe"].append(probe(first, bank.labels, second, queries.labels))
            ways[FOREGROUND].append(foreground(look._replace(size=look.map_size or look.size), *scenes))
        found[who] = ways
    return found


def labelled(name: str, every: int) -> tuple[LabelledImages, LabelledImages]:
    """Training pictures and held-out ones of a set's large groups, as large as any model sees them."""
    both = [sets.labelled(rows)[::every] for rows in sets.split(sets.pictures(name))]
    groups = {row.label for row in both[0]} & {row.label for row in both[1]}
    bank, queries = ([row for row in rows if row.label in groups] for rows in both)
    return measure.squares(bank, _TEACHER_SIZE), measure.squares(queries, _TEACHER_SIZE)


def knn(bank: Floats, labels: Sequence[str], queries: Floats, wanted: Sequence[str]) -> Asked:
    """Of which held-out pictures the label wins among their 5 nearest training pictures, by cosine."""
    return _right(knn_vote(bank, labels, queries, measure.NEIGHBOURS), wanted)


def probe(bank: Floats, labels: Sequence[str], queries: Floats, wanted: Sequence[str]) -> Asked:
    """Which held-out pictures a logistic regression gets right; its strength is chosen on training pictures."""
    model = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(
            Cs=list(_STRENGTHS),
            cv=3,
            scoring="accuracy",
            max_iter=500,
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
        ),
    )
    model.fit(bank, labels)
    return _right(model.predict(queries), wanted)


def foreground(look: Look, training: Scenes, held_out: Scenes) -> Asked:
    """Foreground and background of held-out scenes; their value is the mean IoU of both, over all pixels.

    A logistic regression on patches of training scenes says how much of a patch is foreground. Its logits are blown up
    to the size of the scene, bilinearly, and cut at 0: every grid is asked about the same pixels.
    """
    patches_NPD = look(training.images).patches
    side = round(patches_NPD.shape[1] ** 0.5)
    share = training.cells(side).reshape(-1)
    chosen = np.random.default_rng(0).permutation(len(share))[:_PATCHES]
    rows = patches_NPD.reshape(-1, patches_NPD.shape[2])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    model.fit(rows[chosen], share[chosen] > 0.5)
    asked_NPD = look(held_out.images).patches
    logits = model.decision_function(asked_NPD.reshape(-1, asked_NPD.shape[2])).reshape(-1, side, side)
    height, width = held_out.masks.shape[1:]
    maps = [cv2.resize(one.astype(np.float32), (width, height)) > 0 for one in logits]
    return overlaps(np.stack(maps), held_out.masks)


def overlaps(said: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> Asked:
    """Of each scene (N, H, W) the pixels of intersection and union (N, 2, 2), of foreground and of background."""
    counts = [
        [(one & other).sum((1, 2)), (one | other).sum((1, 2))]
        for one, other in ((said, wanted), (~said, ~wanted))
    ]
    return np.asarray(counts, np.float64).transpose(2, 0, 1)


def _right(said: NDArray[np.str_], wanted: Sequence[str]) -> Asked:
    return np.asarray(said == np.asarray(wanted), np.float64)


def _resized(images_NCHW: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if images_NCHW.shape[-1] == size:
        return images_NCHW
    method = cv2.INTER_AREA if images_NCHW.shape[-1] > size else cv2.INTER_CUBIC
    return np.stack(
        [cv2.resize(one.transpose(1, 2, 0), (size, size), interpolation=method) for one in images_NCHW]
    ).transpose(0, 3, 1, 2)


def _scaled(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    of_mean, of_std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (images.float() / 255 - of_mean) / of_std
