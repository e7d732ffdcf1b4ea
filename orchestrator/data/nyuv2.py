"""NYUv2 as it is published: one .mat file (HDF5, MATLAB v7.3) with `images` and `depths`, unpacked once into a cache.

MATLAB keeps arrays by columns, so HDF5 has them turned: `images` is (N, 3, W, H) uint8, `depths` (N, W, H) float32 in
metres. Pictures are unpacked one at a time, so memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orchestrator import disk
from orchestrator.config.dense import NYUV2_SPLITS, DepthData
from orchestrator.errors import UserError
from orchestrator.fsio import move
from orchestrator.progress import ROUTINE, Meter
from orchestrator.storage.cache_folder import cache_folder

logger = logging.getLogger("orchestrator")

# A number in an unpacked depth map is 0.2 mm: 13 m fit, and the set ends at 10.
_SCALE = 5000.0
_PARTS = ("images", "depths")
_HINT = "nyu_depth_v2_labeled.mat has `images` (N, 3, W, H) of bytes and `depths` (N, W, H) in metres"


def unpacked(data: DepthData) -> DepthData:
    """The data set as folders, which are made in the cache if they are not there.

    Depth is rounded to 0.2 mm. With `splits.mat` beside the file, pictures are in `images/train` and `images/test`.

    Raises:
        UserError: h5py is not installed, the file is none of NYUv2, or there is no space.
    """
    if data.layout != "nyuv2":
        return data
    path = data.path
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"there is no file {path}", where=str(path), hint=_HINT) from error
    splits = path.with_name(NYUV2_SPLITS)
    stamp = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    stamp += [splits.stat().st_size, splits.stat().st_mtime_ns] if splits.is_file() else []
    name = hashlib.sha256("\0".join(map(str, stamp)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    folder = cache_folder() / "nyuv2" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with disk.making(folder, "set ORCHESTRATOR_CACHE to a folder with more space") as draft:
            _unpack(path, draft / "set", _official(splits) if splits.is_file() else {})
            try:
                move(draft / "set", folder)
            except OSError:
                # Another process, which unpacked it at the same time, was faster.
                if not folder.is_dir():
                    raise
    return data.model_copy(
        update={"path": folder, "layout": "folders", "scale": _SCALE, "split": data.chosen_split()}
    )


def _unpack(path: Path, out: Path, split_of: Mapping[int, str]) -> None:
    with _opened(path) as file:
        images, depths = (_dataset(file, part, path) for part in _PARTS)
        if (
            len(images.shape) != 4
            or images.shape[1] != 3
            or depths.shape != (images.shape[0], *images.shape[2:])
        ):
            what = f"`images` is {images.shape} and `depths` {depths.shape}"
            raise UserError(what, where=str(path), hint=_HINT)
        count = int(images.shape[0])
        logger.info("%s: unpacking %s pictures, once", path.name, f"{count:,}", extra=ROUTINE)
        meter = Meter(path.name, count, "pictures unpacked")
        for row in range(count):
            # Numbers are MATLAB's, from 1.
            name = f"{split_of.get(row + 1, '')}/{row + 1:04}.png".lstrip("/")
            depth_WH = np.nan_to_num(depths[row].astype(np.float64), posinf=0.0, neginf=0.0)
            numbers_WH = np.rint(depth_WH * _SCALE).clip(0, 65535).astype(np.uint16)
            for part, pixels in (("images", images[row].transpose(2, 1, 0)), ("depth", numbers_WH.T)):
                target = out / part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(pixels)).save(target, compress_level=1)
            meter.add()


def _opened(path: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise UserError(
            "NYUv2's file is HDF5, and h5py is not installed",
            where=str(path),
            hint='install it: pip install "dinov3-orchestrator[nyuv2]"',
        ) from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"the file cannot be read: {error}", where=str(path), hint=_HINT) from error


def _dataset(file: Any, name: str, path: Path) -> Any:
    found = file.get(name)
    if getattr(found, "shape", None) is None:
        there = ", ".join(sorted(map(str, file))[:10])
        raise UserError(f"the file has no {name!r}; it has {there}", where=str(path), hint=_HINT)
    return found


def _official(path: Path) -> dict[int, str]:
    """The numbers of pictures by the official split; raises UserError if the file is another one."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    hint = "splits.mat has trainNdxs and testNdxs; remove it to split by hash"
    try:
        record = loadmat(path, variable_names=["trainNdxs", "testNdxs"])
        parts: dict[str, Sequence[int]] = {
            split: record[name].ravel().astype(int).tolist()
            for split, name in (("train", "trainNdxs"), ("test", "testNdxs"))
        }
    except (MatReadError, OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise UserError(f"the official split cannot be read: {error}", where=str(path), hint=hint) from error
    return {number: split for split, numbers in parts.items() for number in numbers}
