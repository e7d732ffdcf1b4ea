"""Scores of towers that need no training: k-NN on pictures, k-NN on patches, and what dense health says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from bench.learning.sets import mask_of
from orchestrator.data.decode import read_rgb
from orchestrator.data.index import ImageRecord
from orchestrator.evaluation.metrics.knn import knn_leave_one_out, knn_vote
from orchestrator.models import Backbone, build, normalise
from orchestrator.objectives.dense_health import cls_patch_cosine, patch_locality
from orchestrator.training.export import load_export

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

NEIGHBOURS = 5
_BATCH = 64
# Side of the raw pixels that are compared, as in the published baselines of these sets.
_RAW_SIDE = 32
_CANVAS = 128
_PATCHES = 6000


@dataclass(frozen=True)
class LabelledImages:
    """Square pictures (N, 3, H, W) uint8 and their labels."""

    images: Pixels
    labels: list[str]


def squares(rows: Sequence[ImageRecord], size: int) -> LabelledImages:
    """Each picture's central square at `size` pixels."""
    images = np.stack([_resized(_central(read_rgb(Path(row.root) / row.path)), size) for row in rows])
    return LabelledImages(images.transpose(0, 3, 1, 2), [row.label or "" for row in rows])


def snapshot(path: Path, model: str) -> Backbone:
    """The backbone of an exported EMA, in eval mode."""
    net = build(model)
    net.load_state_dict(load_export(path, "backbone."))
    return net.eval()


def random_net(model: str, seed: int) -> Backbone:
    """A backbone as it starts."""
    torch.manual_seed(seed)
    return build(model).eval()


@torch.no_grad()
def features(net: Backbone, images_NCHW: Pixels) -> tuple[Floats, Floats]:
    """CLS (N, D) and patches (N, P, D)."""
    cls, patches = [], []
    for start in range(0, len(images_NCHW), _BATCH):
        out = net(normalise(torch.from_numpy(images_NCHW[start : start + _BATCH])))
        cls.append(out.cls.numpy())
        patches.append(out.patches.numpy())
    return np.concatenate(cls), np.concatenate(patches)


def knn(bank: LabelledImages, queries: LabelledImages, net: Backbone) -> float:
    """Share of held-out pictures whose label wins among their 5 nearest training pictures, by cosine of CLS."""
    return _vote(features(net, bank.images)[0], bank.labels, features(net, queries.images)[0], queries.labels)


def knn_among(pictures: LabelledImages, net: Backbone) -> float:
    """The same where each picture is asked of all the others."""
    return knn_leave_one_out(features(net, pictures.images)[0], pictures.labels, NEIGHBOURS)


def knn_raw(bank: LabelledImages, queries: LabelledImages) -> float:
    """The same of pixels, by Euclidean distance or cosine, whichever is better: the stronger baseline."""
    first, second = _raw(bank), _raw(queries)
    plain = KNeighborsClassifier(NEIGHBOURS).fit(first, bank.labels).score(second, queries.labels)
    return max(float(plain), _vote(first, bank.labels, second, queries.labels))


def majority(pictures: LabelledImages) -> float:
    """Share of the largest group: what saying always the same would score."""
    return max(Counter(pictures.labels).values()) / len(pictures.labels)


@dataclass(frozen=True)
class Scenes:
    """Cut-outs laid on photographs: images (N, 3, H, W) uint8 and foreground masks (N, H, W) bool."""

    images: Pixels
    masks: NDArray[np.bool_]

    def cells(self, grid: int) -> Floats:
        """Share of foreground (N, grid²) in each cell of a grid."""
        maps = [
            cv2.resize(mask.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA)
            for mask in self.masks
        ]
        return np.stack(maps).reshape(len(maps), -1)

    def at(self, size: int) -> Scenes:
        """The same at another size."""
        images = np.stack(
            [_resized(image.transpose(1, 2, 0), size).transpose(2, 0, 1) for image in self.images]
        )
        return Scenes(images, self.masks)


def scenes(
    cut_outs: Sequence[ImageRecord], photos: Sequence[ImageRecord], count: int, seed: int = 0
) -> Scenes:
    """Cut-outs at random places and sizes on photographs. On white, colour alone would tell the foreground."""
    rng = np.random.default_rng(seed)
    with_mask = [(row, mask) for row in cut_outs if (mask := mask_of(row)) is not None]
    images, masks = [], []
    for _ in range(count):
        row, alpha = with_mask[int(rng.integers(len(with_mask)))]
        photo = photos[int(rng.integers(len(photos)))]
        image = _resized(_central(read_rgb(Path(photo.root) / photo.path)), _CANVAS)
        share = _lay(image, read_rgb(Path(row.root) / row.path), alpha, rng)
        images.append(image.transpose(2, 0, 1))
        masks.append(share > 0.5)
    return Scenes(np.stack(images), np.stack(masks))


def patch_knn(bank: Scenes, queries: Scenes, net: Backbone, seed: int = 0) -> float:
    """Balanced accuracy of foreground or background by the 5 nearest training patches, by cosine."""
    first, first_is = _labelled_patches(bank, net, seed)
    second, second_is = _labelled_patches(queries, net, seed + 1)
    votes = knn_vote(first, first_is, second, NEIGHBOURS)
    return float(balanced_accuracy_score(second_is, votes))


def patch_within(scenes: Scenes, net: Backbone) -> float:
    """Balanced accuracy of foreground or background by each patch's nearest other patch of its own picture, by cosine.

    Patches that touch it do not count, as neighbours are alike in any net. Nothing is trained and no other picture is
    asked: what a Gram matrix holds is all that this sees.
    """
    patches_NPD = features(net, scenes.images)[1]
    side = round(patches_NPD.shape[1] ** 0.5)
    rows, columns = np.divmod(np.arange(side * side), side)
    touches = (abs(rows[:, None] - rows) <= 1) & (abs(columns[:, None] - columns) <= 1)
    wanted, found = [], []
    for patches_PD, share in zip(patches_NPD, scenes.cells(side), strict=True):
        unit = _unit(patches_PD)
        clear = _clear(share)
        cosines = np.where(touches | ~clear, -np.inf, unit @ unit.T)
        asked = clear & np.isfinite(cosines.max(1))
        wanted.append(share[asked] > 0.5)
        found.append(share[cosines.argmax(1)][asked] > 0.5)
    return float(balanced_accuracy_score(np.concatenate(wanted), np.concatenate(found)))


def health(net: Backbone, images: Pixels) -> dict[str, float]:
    """CLS–patch cosine and patch locality of pictures."""
    cls, patches = (torch.from_numpy(array) for array in features(net, images))
    side = round(patches.shape[1] ** 0.5)
    return {
        "cls_patch_cosine": float(cls_patch_cosine(cls, patches)),
        "patch_locality": float(patch_locality(patches, (side, side))),
    }


def _labelled_patches(pictures: Scenes, net: Backbone, seed: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Patches that are clearly one or the other; the same ones for every net of one grid."""
    patches_NPD = features(net, pictures.images)[1]
    share = pictures.cells(round(patches_NPD.shape[1] ** 0.5)).reshape(-1)
    clear = np.flatnonzero(_clear(share))
    chosen = np.random.default_rng(seed).permutation(clear)[:_PATCHES]
    return patches_NPD.reshape(-1, patches_NPD.shape[2])[chosen], share[chosen] > 0.5


def _clear(share: Floats) -> NDArray[np.bool_]:
    """Which cells are one or the other, and not both."""
    return (share < 0.2) | (share > 0.8)


def _lay(image: Pixels, cut_out: Pixels, alpha: Pixels, rng: np.random.Generator) -> Floats:
    """Blend a cut-out into `image` in place; returns its share in each pixel."""
    target = rng.uniform(0.45, 0.8) * _CANVAS
    scale = target / max(alpha.shape)
    size = (max(1, round(alpha.shape[1] * scale)), max(1, round(alpha.shape[0] * scale)))
    small = cv2.resize(cut_out, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    share = np.zeros((_CANVAS, _CANVAS), np.float32)
    top, left = int(rng.integers(_CANVAS - size[1] + 1)), int(rng.integers(_CANVAS - size[0] + 1))
    place = (slice(top, top + size[1]), slice(left, left + size[0]))
    share[place] = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    # The picture's file was already laid on white: c = a·colour + (1 − a)·255.
    image[place] = np.clip(
        small + (1 - share[place])[..., None] * (image[place].astype(np.float32) - 255), 0, 255
    )
    return share


def _vote(bank_ND: Floats, labels: Sequence[str], queries_MD: Floats, wanted: Sequence[str]) -> float:
    return float((knn_vote(bank_ND, labels, queries_MD, NEIGHBOURS) == np.asarray(wanted)).mean())


def _raw(pictures: LabelledImages) -> Floats:
    small = [_resized(image.transpose(1, 2, 0), _RAW_SIDE) for image in pictures.images]
    return np.asarray(np.stack(small).reshape(len(small), -1) / 255, np.float32)


def _central(image_HWC: Pixels) -> Pixels:
    height, width = image_HWC.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image_HWC[top : top + side, left : left + side]


def _resized(image_HWC: Pixels, size: int) -> Pixels:
    method = cv2.INTER_AREA if image_HWC.shape[0] >= size else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image_HWC, (size, size), interpolation=method), np.uint8)


def _unit(rows_ND: Floats) -> Floats:
    return np.asarray(rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-9), np.float32)
