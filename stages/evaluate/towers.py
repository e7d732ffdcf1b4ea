"""The torch side of `evaluate`: towers as functions from photographs to vectors and feature maps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from orchestrator.data.decode import UnreadableImage, read_rgb
from orchestrator.data.index import ImageIndex
from orchestrator.data.rng import derive
from orchestrator.errors import UserError
from orchestrator.models import Backbone, Features, count_params, from_config, load_pretrained, normalise
from orchestrator.training.device import device_type
from orchestrator.training.export import load_export

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Check = Callable[[], None]


@dataclass(frozen=True)
class Tower:
    """A backbone in eval mode, the preset it was made from, and the side in pixels of its photos."""

    model: Backbone
    preset: str
    size: int

    @property
    def num_parameters(self) -> int:
        """Weights of the backbone alone."""
        return count_params(self.model)


class Crops:
    """Photos of an index as centred squares, decoded once for every side that is asked for.

    Args:
        index: the index.
        rows: which photos, in which order.
        check: called now and then; may raise `Stopped`.
    """

    def __init__(self, index: ImageIndex, rows: Sequence[int], check: Check) -> None:
        self.rows = rows
        self._index, self._check = index, check
        self._kept: dict[int, Pixels] = {}

    def at(self, size: int) -> Pixels:
        """Uint8 (N, size, size, 3): what `orchestrator.models.embed` sees, but for JPEGs decoded smaller."""
        if size not in self._kept:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self._kept[size] = np.stack(list(pool.map(partial(self._square, size=size), self.rows)))
        return self._kept[size]

    def _square(self, row: int, size: int) -> Pixels:
        self._check()
        # Twice the side leaves the resampling of large photos to the antialiased bicubic filter.
        photo = Image.fromarray(read_photo(self._index, row, min_side=2 * size))
        return np.asarray(ImageOps.fit(photo, (size, size), Image.Resampling.BICUBIC))


def read_photo(index: ImageIndex, row: int, min_side: int | None = None) -> Pixels:
    """A photo of the index.

    Raises:
        UserError: its file is gone or broken since the index was made.
    """
    try:
        return read_rgb(index.path(row), min_side)
    except UnreadableImage as error:
        raise UserError(
            f"a photo of the index cannot be read any more: {error.reason}",
            where=str(error.path),
            hint="restore the file, or run again: `curate` then makes a new index of the files that exist",
        ) from error


def read_settings(folder: Path) -> tuple[str, int]:
    """Preset and image size of a model folder, without its weights."""
    record = json.loads((folder / "config.json").read_text())
    return record["preset"], int(record["extra"]["image_size"])


def load_tower(
    folder: Path, size: int | None, where: str, weights: Path | None = None, wanted: str = "auto"
) -> Tower:
    """The model of a folder, on the device that this process may use.

    Args:
        folder: as `save_pretrained` wrote it.
        size: pixels a side; default: what it was trained for.
        where: key path of `size`, for the error message.
        weights: a snapshot, whose backbone replaces the folder's weights.
        wanted: an `elastic.device`: `cpu` uses no GPU.

    Raises:
        UserError: `size` is not a multiple of the model's patch.
    """
    preset, own_size = read_settings(folder)
    model = load_pretrained(folder)
    size = size or own_size
    if size % model.patch_size:
        raise UserError(
            f"the patch size of {preset}, {model.patch_size} pixels, does not divide {size} pixels",
            where=where,
            hint=f"use {max(1, size // model.patch_size) * model.patch_size}, or leave it out",
        )
    if weights is not None:
        model.load_state_dict(load_export(weights, "backbone."))
    return Tower(model.to(device_type(wanted)), preset, size)


def random_tower(tower: Tower, seed: int) -> Tower:
    """The same architecture as it was before any training: one draw of its initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "random weights", tower.preset) % 2**63)
        model = from_config(tower.model.config)
    return Tower(model.eval().to(_device_of(tower)), tower.preset, tower.size)


@torch.inference_mode()
def embed_crops(tower: Tower, crops_NHWC: Pixels, batch: int, check: Check) -> Floats:
    """CLS features of square crops, fp32 (N, D), not normalised."""
    found = []
    for start in range(0, len(crops_NHWC), batch):
        check()
        found.append(_features(tower, crops_NHWC[start : start + batch]).cls.float().cpu())
    return torch.cat(found).numpy()


@torch.inference_mode()
def patch_crops(tower: Tower, crops_NHWC: Pixels, batch: int, check: Check) -> Floats:
    """Patch features of square crops, fp32 (N, P, D), in the order of rows."""
    found = []
    for start in range(0, len(crops_NHWC), batch):
        check()
        found.append(_features(tower, crops_NHWC[start : start + batch]).patches.float().cpu())
    return torch.cat(found).numpy()


@torch.inference_mode()
def feature_maps(tower: Tower, crops_NHWC: Pixels) -> list[Floats]:
    """Patch features of square crops of any side the patch divides: (h, w, D) each."""
    side = crops_NHWC.shape[1] // tower.model.patch_size
    patches_NPD: Floats = _features(tower, crops_NHWC).patches.float().cpu().numpy()
    return list(patches_NPD.reshape(len(patches_NPD), side, side, -1))


def pixel_features(crops_NHWC: Pixels) -> Floats:
    """The raw-pixel baseline: pixels of small crops minus their mean over all photos, (N, H·W·3)."""
    flat_ND: Floats = crops_NHWC.reshape(len(crops_NHWC), -1).astype(np.float32)
    flat_ND -= flat_ND.mean(axis=0)
    return flat_ND


def _features(tower: Tower, crops_NHWC: Pixels) -> Features:
    images_NCHW = torch.from_numpy(np.ascontiguousarray(crops_NHWC.transpose(0, 3, 1, 2)))
    features: Features = tower.model(normalise(images_NCHW.to(_device_of(tower))))
    return features


def _device_of(tower: Tower) -> torch.device:
    return next(tower.model.parameters()).device
