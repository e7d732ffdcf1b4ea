"""The torch side of `evaluate`: towers as functions from photographs to vectors and feature maps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt, prod
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.decode import UnreadableImage, read_rgb, read_square, square
from orchestrator.data.index import ImageIndex
from orchestrator.data.large_arrays import empty, stacked
from orchestrator.data.read_ahead import in_order
from orchestrator.data.rng import derive
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import FoundBoxes
from orchestrator.models import (
    Backbone,
    BackboneFeatures,
    count_params,
    from_config,
    load_pretrained,
    normalise,
    set_stats,
    stats_of,
)
from orchestrator.models.wrapped import ForeignNet, Tokens, WrappedNet
from orchestrator.models.wrapped_backbone import WrappedBackbone, build_wrapped, is_wrapped, load_wrapped
from orchestrator.stages.common.network_source import NetworkSource, as_recorded
from orchestrator.stages.common.open_network import as_seen, open_network
from orchestrator.stages.common.predictor import Predictor, load_predictor
from orchestrator.stages.evaluate.remembered import FeatureMemory, model_key
from orchestrator.training.device import device_type
from orchestrator.training.export import load_export

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Check = Callable[[], None]
Part = Literal["cls", "patches"]
_PARTS: tuple[Part, Part] = ("cls", "patches")

_taken: WeakKeyDictionary[WrappedNet, dict[int, bool]] = WeakKeyDictionary()

# Bytes of the squares of one size that are kept for the next model; more are read again for each.
_KEPT = 256 * 2**20
# Batches that are read while a model computes.
_AHEAD = 2
# Squares that wait for each thread's turn.
_WAITING = 8


@dataclass(frozen=True)
class Tower:
    """A backbone in eval mode, the preset it was made from, and the side in pixels of its photos.

    `source` is where a model from elsewhere comes from: it says how its pixels are normalised. `pixels` says which
    bands the channels of the photos are, which such a model may see some of. `predictor` is the head of a fine-tuned
    model. `memory` has features that were computed before.
    """

    model: Backbone | WrappedBackbone | ForeignNet
    preset: str
    size: int
    source: NetworkSource | None = None
    pixels: PixelFormat | None = None
    predictor: Predictor | None = None
    memory: FeatureMemory | None = None

    @property
    def task(self) -> str | None:
        """What it was fine-tuned for; None of a backbone."""
        return None if self.predictor is None else self.predictor.task

    @property
    def map_size(self) -> int:
        """The side at which feature maps are drawn: twice that of training where the network takes it.

        Position encodings of the towers allow it, and the eye likes it.
        """
        twice = 2 * self.size
        return twice if not isinstance(self.model, WrappedNet) or self.model.takes(twice) else self.size

    @property
    def patch(self) -> int:
        """The side in pixels of what one patch feature is of."""
        if isinstance(self.model, ForeignNet):
            return max(1, self.size // self.model.grid[0])
        return int(self.model.patch_size)

    def takes(self, size: int) -> bool:
        """Whether it can be asked for images of `size` pixels a side."""
        if size == self.size:
            return True
        if not isinstance(self.model, WrappedNet):
            return size % self.patch == 0
        # The network is run to find out.
        known = _taken.setdefault(self.model, {})
        if size not in known:
            known[size] = size % self.patch == 0 and self.model.takes(size)
        return known[size]

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
        """(N, size, size, 3) uint8, or uint16 where the index says so, as `orchestrator.embed` sees them."""
        if size not in self._kept:
            read, loaders = partial(self._square, size=size), os.cpu_count() or 1
            squares = in_order(read, self.rows, loaders, ahead=_WAITING * loaders)
            self._kept[size] = stacked((pixels[None] for pixels in squares), len(self.rows))
        return self._kept[size]

    def batches(self, size: int, batch: int) -> Iterator[Pixels]:
        """As :meth:`at`, `batch` at a time; memory does not grow with the number of photos."""
        if size in self._kept or len(self.rows) * self._index.num_channels * size**2 <= _KEPT:
            squares = self.at(size)
            yield from (squares[start : start + batch] for start in range(0, len(squares), batch))
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting: list[list[Future[Pixels]]] = []
            for start in range(0, len(self.rows), batch):
                rows = self.rows[start : start + batch]
                waiting.append([pool.submit(self._square, row, size) for row in rows])
                if len(waiting) > _AHEAD:
                    yield np.stack([one.result() for one in waiting.pop(0)])
            while waiting:
                yield np.stack([one.result() for one in waiting.pop(0)])

    def _square(self, row: int, size: int) -> Pixels:
        self._check()
        return read_photo(self._index, row, partial(read_square, size=size))


def read_photo(index: ImageIndex, row: int, read: Callable[..., Pixels] = read_rgb) -> Pixels:
    """What `read` makes of the file of a photo of the index, by default all its pixels.

    Raises:
        UserError: its file is gone or broken since the index was made.
    """
    try:
        return read(index.path(row), max_pixels=index[row].max_pixels, pixels=index.pixels(row))
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
    folder: Path,
    size: int | None,
    where: str,
    weights: Path | None = None,
    wanted: str = "auto",
    trusted: Sequence[str] = (),
) -> Tower:
    """The model of a folder, on the device that this process may use.

    Args:
        folder: as `save_pretrained` wrote it.
        size: pixels a side; default: what it was trained for.
        where: key path of `size`, for the error message.
        weights: a snapshot, whose backbone replaces the folder's weights.
        wanted: an `elastic.device`: `cpu` uses no GPU.
        trusted: modules that may be imported, see `load_wrapped`.

    Raises:
        UserError: `size` is not a multiple of the model's patch, or the folder names a module that the pipeline does
            not.
    """
    preset, own_size = read_settings(folder)
    model: Backbone | WrappedBackbone
    if is_wrapped(folder):
        try:
            model = load_wrapped(folder, trusted)
        except (ValueError, ModuleNotFoundError) as error:
            hint = "run the stage that trains it again, with the same `module`"
            raise UserError(str(error), where=str(folder), hint=hint) from error
    else:
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
    predictor = load_predictor(folder, model.dim) if weights is None else None
    return Tower(model.to(device_type(wanted)), preset, size, predictor=predictor)


def outside_tower(
    source: NetworkSource,
    name: str,
    size: int,
    where: str,
    wanted: str = "auto",
    pixels: PixelFormat | None = None,
) -> Tower:
    """A model from elsewhere, on the device that this process may use.

    Args:
        source: where it comes from.
        name: that the pipeline file gives it.
        size: pixels a side of its photos, if it says no other.
        where: key path of the source, for the error message.
        wanted: an `elastic.device`: `cpu` uses no GPU.
        pixels: how the photos are seen; None for 8-bit RGB.

    Raises:
        UserError: it is not there, what it gives is not clear, or it takes other channels than it would see.
    """
    size = source.size or size
    source = as_recorded(source)
    try:
        source.channels(pixels)
    except UserError as error:
        raise UserError(error.what, where=f"{where}.{error.where}", hint=error.hint) from None
    net = open_network(source, size, f"the model {name!r}", where)
    return Tower(net.to(device_type(wanted)), source.shown, size, source, pixels)


def random_tower(tower: Tower, seed: int) -> Tower:
    """The same architecture as it was before any training: one draw of its initial weights."""
    drawn = derive(seed, "random weights", tower.preset) % 2**63
    model: Backbone | WrappedBackbone
    if isinstance(tower.model, WrappedBackbone):
        model = build_wrapped(tower.model.spec, tower.model.size, drawn)
    else:
        assert not isinstance(tower.model, ForeignNet), "there is no untrained one to compare it with"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(drawn)
            model = from_config(tower.model.config)
    set_stats(model, *stats_of(tower.model))
    return Tower(model.eval().to(_device_of(tower)), tower.preset, tower.size)


@torch.inference_mode()
def embed_crops(tower: Tower, batches: Iterable[Pixels], num_crops: int, check: Check) -> Floats:
    """CLS features of batches of square crops, fp32 (N, D), not normalised."""
    return _parts(tower, batches, num_crops, "cls", check)


@torch.inference_mode()
def patch_crops(tower: Tower, batches: Iterable[Pixels], num_crops: int, check: Check) -> Floats:
    """Patch features of batches of square crops, fp32 (N, P, D), in the order of rows."""
    return _parts(tower, batches, num_crops, "patches", check)


def embed_at(tower: Tower, crops: Crops, scale: float, batch: int, check: Check) -> Floats | None:
    """CLS features at a multiple of the tower's size, in whole patches; None if it does not take that size."""
    size = max(1, round(scale * tower.size / tower.patch)) * tower.patch
    if not tower.takes(size):
        return None
    return embed_crops(tower, crops.batches(size, batch), len(crops.rows), check)


def dense_maps(tower: Tower, crops_NHWC: Pixels) -> Floats:
    """Patch features (N, h, w, D); of a size that the tower does not take, of the photos at its own size."""
    if not tower.takes(crops_NHWC.shape[1]):
        crops_NHWC = np.stack([square(pixels, tower.size) for pixels in crops_NHWC])
    return np.stack(feature_maps(tower, crops_NHWC))


def pixel_maps(crops_NHWC: Pixels, patch: int) -> Floats:
    """The raw-pixel baseline of patch features: the pixels of each patch, (N, h, w, 3·patch²), from -0.5 to 0.5."""
    count, side = crops_NHWC.shape[0], crops_NHWC.shape[1] // patch
    cut = crops_NHWC.reshape(count, side, patch, side, patch, 3).swapaxes(2, 3)
    maps: Floats = cut.reshape(count, side, side, -1).astype(np.float32) / np.float32(255) - np.float32(0.5)
    return maps


@torch.inference_mode()
def found_boxes(tower: Tower, crops_NHWC: Pixels) -> list[FoundBoxes]:
    """What a model that was fine-tuned for detection finds in square crops: boxes, scores and places of classes."""
    from orchestrator.models.detr import detections

    assert tower.predictor is not None
    head = tower.predictor.head.to(_device_of(tower))
    if tower.memory is None:
        seen = _features(tower, crops_NHWC)
        cls, patches = seen.cls, seen.patches
    else:
        cls, patches = (
            torch.from_numpy(_part(tower, crops_NHWC, part)).to(_device_of(tower)) for part in _PARTS
        )
    # Heads read no storage tokens.
    features = BackboneFeatures(cls, cls.new_zeros(len(cls), 0, cls.shape[-1]), patches)
    rows = head(features, crops_NHWC.shape[1:3])[:, -1].float()
    parts = (detections(rows_QK, len(tower.predictor.classes)) for rows_QK in rows)
    return [
        (boxes.cpu().numpy(), scores.cpu().numpy(), places.cpu().numpy()) for boxes, scores, places in parts
    ]


@torch.inference_mode()
def feature_maps(tower: Tower, crops_NHWC: Pixels) -> list[Floats]:
    """Patch features of square crops of any side the patch divides: (h, w, D) each."""
    patches_NPD = _part(tower, crops_NHWC, "patches")
    side = isqrt(patches_NPD.shape[1])
    return list(patches_NPD.reshape(len(patches_NPD), side, side, -1))


def pixel_features(crops_NHWC: Pixels) -> Floats:
    """The raw-pixel baseline: pixels of small crops minus their mean over all photos, (N, H·W·3)."""
    flat_ND: Floats = empty((len(crops_NHWC), prod(crops_NHWC.shape[1:])), np.float32)
    flat_ND[:] = crops_NHWC.reshape(flat_ND.shape)
    flat_ND -= flat_ND.mean(axis=0)
    return flat_ND


def _parts(tower: Tower, batches: Iterable[Pixels], num_crops: int, part: Part, check: Check) -> Floats:
    def of(crops_NHWC: Pixels) -> Floats:
        check()
        return _part(tower, crops_NHWC, part)

    found: Floats = stacked(map(of, batches), num_crops)
    return found


def _part(tower: Tower, crops_NHWC: Pixels, part: Part) -> Floats:
    """The CLS features (N, D) or patch features (N, P, D) of crops, float32; from memory as far as it has them."""

    def compute(some_NHWC: Pixels) -> Floats:
        # A copy: what is only a view of them would keep the other features alive.
        found: Floats = getattr(_features(tower, some_NHWC), part).float().cpu().numpy().copy()
        return found

    return compute(crops_NHWC) if tower.memory is None else tower.memory.through(part, crops_NHWC, compute)


def remembering(tower: Tower, limit: float) -> Tower:
    """A tower that knows the features that were computed before, and keeps those that it computes.

    Args:
        tower: any; one whose code may change is given back as it is.
        limit: GiB that the features of all models may take on disk; 0 for none.
    """
    key = model_key(tower) if limit else None
    return tower if key is None else replace(tower, memory=FeatureMemory.opened(key, int(limit * 2**30)))


def _features(tower: Tower, crops_NHWC: Pixels) -> BackboneFeatures | Tokens:
    images_NCHW = torch.from_numpy(np.ascontiguousarray(crops_NHWC.transpose(0, 3, 1, 2))).to(
        _device_of(tower)
    )
    seen_NCHW = (
        normalise(images_NCHW, tower.model)
        if tower.source is None
        else as_seen(images_NCHW, tower.source, images_NCHW.shape[-1], tower.pixels)
    )
    features: BackboneFeatures | Tokens = tower.model(seen_NCHW)
    return features


def _device_of(tower: Tower) -> torch.device:
    return next(tower.model.parameters()).device
