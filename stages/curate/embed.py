"""What a network says of every photo, in blocks: a run that was cut off goes on after the blocks that are done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.decode import Pixels, UnreadableImage, read_square
from orchestrator.errors import UserError
from orchestrator.fsio import replacing
from orchestrator.stages.common.network_source import NetworkSource
from orchestrator.stages.common.open_network import as_recorded, as_seen, open_network
from orchestrator.training.device import device_type

Floats = NDArray[np.float32]

# Photos of a block, which is what a run that was cut off does again; and of a forward pass.
_BLOCK = 256
_BATCH = 32
_FORMAT = 1


@dataclass(frozen=True)
class PhotoFile:
    """A photo to embed: its file, what it holds, and how its values are seen."""

    path: Path
    sha256: str
    max_pixels: int
    pixels: PixelFormat | None = None


def embed_photos(
    photos: Sequence[PhotoFile],
    source: NetworkSource,
    size: int,
    work: Path,
    target: Path,
    *,
    where: str,
    identity: str,
    device: str = "auto",
    step: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """Write the image features of photos, of length 1, to a `.npy` file: float32, one row a photo.

    Args:
        photos: in the order of rows.
        source: the network.
        size: pixels a side of the centred square that it sees.
        work: a folder for finished blocks, which a later run of the same photos takes up.
        target: the file.
        where: key path of the source, for error messages.
        identity: of the network: blocks of another one are not taken up.
        device: an `elastic.device`.
        step: is told how many photos are done; raises to stop.

    Returns:
        The photos whose files cannot be read any more. They have no row.

    Raises:
        UserError: the network is not there, what it gives is not clear or not finite, or no photo can be read.
    """
    work.mkdir(parents=True, exist_ok=True)
    blocks = [photos[start : start + _BLOCK] for start in range(0, len(photos), _BLOCK)]
    files = [work / f"{_digest(block, source, size, identity)}.npy" for block in blocks]
    network: Callable[[Sequence[Pixels]], Floats] | None = None
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    step(sum(len(block) for block, file in zip(blocks, files, strict=True) if file.is_file()))
    for number, squares in zip(missing, _read_ahead([blocks[at] for at in missing], size), strict=True):
        network = network or _network(source, size, where, device)
        readable = [at for at, square in enumerate(squares) if square is not None]
        seen = [square for square in squares if square is not None]
        vectors_nD = network(seen)
        # Where there is nothing, the file says so by itself.
        found_nD = np.full((len(squares), vectors_nD.shape[1]), np.nan, np.float32)
        found_nD[readable] = vectors_nD
        with replacing(files[number], only_writer=True) as draft, draft.open("wb") as file:
            np.save(file, found_nD)
        step(len(squares))
    return _joined(files, target, where)


def _network(
    source: NetworkSource, size: int, where: str, device: str
) -> Callable[[Sequence[Pixels]], Floats]:
    """Makes unit vectors (n, D) of squares; none of none."""
    source = as_recorded(source)
    net = open_network(source, size, f"the network {source.shown!r}", where).to(device_type(device))

    @torch.inference_mode()
    def vectors(squares: Sequence[Pixels]) -> Floats:
        found = [np.empty((0, net.dim), np.float32)]
        for start in range(0, len(squares), _BATCH):
            images_NHWC = torch.from_numpy(np.stack(squares[start : start + _BATCH]))
            images_NCHW = images_NHWC.permute(0, 3, 1, 2).to(device_type(device))
            cls_ND = net(as_seen(images_NCHW, source, size)).cls.float()
            if not torch.isfinite(cls_ND).all():
                raise UserError(
                    f"the network {source.shown!r} gives numbers that are not finite", where=where
                )
            found.append(torch.nn.functional.normalize(cls_ND, dim=1).cpu().numpy())
        return np.concatenate(found)

    return vectors


def _read_ahead(blocks: Sequence[Sequence[PhotoFile]], size: int) -> Iterator[list[Pixels | None]]:
    """The squares of each block, None where a file cannot be read; the next block is read meanwhile."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ahead: list[list[Future[Pixels | None]]] = []
        for number, block in enumerate([*blocks, ()]):
            ahead.append([pool.submit(_square, photo, size) for photo in block])
            if number:
                yield [future.result() for future in ahead.pop(0)]


def _square(photo: PhotoFile, size: int) -> Pixels | None:
    try:
        return read_square(photo.path, size, photo.max_pixels, pixels=photo.pixels)
    except UnreadableImage:
        return None


def _joined(files: Sequence[Path], target: Path, where: str) -> list[int]:
    """Write the rows of all blocks behind each other, without those that are not there; returns these."""
    lost: list[int] = []
    total, width, first = 0, 0, 0
    for file in files:
        block_nD = np.load(file, allow_pickle=False)
        there_n = ~np.isnan(block_nD).any(1)
        lost += (first + np.flatnonzero(~there_n)).tolist()
        first, total, width = first + len(block_nD), total + int(there_n.sum()), block_nD.shape[1]
    if not total:
        raise UserError("none of the photos can be read any more", where=where)
    with target.open("wb") as out:
        npy.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (total, width)})
        for file in files:
            block_nD = np.load(file, allow_pickle=False)
            out.write(np.ascontiguousarray(block_nD[~np.isnan(block_nD).any(1)]).tobytes())
    return lost


def _digest(block: Sequence[PhotoFile], source: NetworkSource, size: int, identity: str) -> str:
    named: list[Any] = [_FORMAT, identity, source.identity(), size]
    named += [[photo.sha256, photo.pixels and photo.pixels.model_dump(mode="json")] for photo in block]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]
