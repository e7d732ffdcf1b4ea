"""What a network says of every photo, in blocks: a run that was cut off goes on after the blocks that are done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.curation.signatures import EmbeddingCache, decoder_versions
from orchestrator.data.curation.vectors import Vectors, open_vectors
from orchestrator.data.decode import Pixels, UnreadableImage, read_square
from orchestrator.errors import Stopped, UserError
from orchestrator.fsio import replacing, sha256_of
from orchestrator.progress import Meter
from orchestrator.stages.base import Context
from orchestrator.stages.common.network_source import NetworkSource, as_recorded
from orchestrator.stages.common.open_network import as_seen, open_network
from orchestrator.stages.curate.workers import ray_processors
from orchestrator.training.device import device_type

if TYPE_CHECKING:
    from orchestrator.data.curation.selection import ImageStatus
    from orchestrator.stages.curate.config import Curate, EmbeddingNetwork

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

    def record(self) -> list[Any]:
        """As plain JSON."""
        pixels = self.pixels and self.pixels.record()
        return [str(self.path), self.sha256, self.max_pixels, pixels]

    @classmethod
    def of(cls, record: Sequence[Any]) -> PhotoFile:
        """From what :meth:`record` gave."""
        path, sha256, max_pixels, pixels = record
        return cls(Path(path), sha256, max_pixels, pixels and PixelFormat.model_validate(pixels))


def embed_unique(
    config: Curate, network: EmbeddingNetwork, context: Context, statuses: Sequence[ImageStatus]
) -> tuple[Vectors, list[ImageStatus]]:
    """What the network says of the unique photos, as `embeddings.npy`, too.

    Returns:
        The features, and the statuses, in which photos that went since they were described are corrupt.

    Raises:
        UserError, Stopped: see :func:`embed_photos`.
    """
    rows = [row for row, status in enumerate(statuses) if status.status == "unique"]
    photos = [
        PhotoFile(
            Path(status.root) / status.photo.path, status.photo.sha256, source.max_pixels, source.pixels
        )
        for status in (statuses[row] for row in rows)
        for source in (context.sources[status.photo.source],)
    ]
    embedded = Meter(context.name, len(photos), "photos embedded")

    def step(count: int) -> None:
        embedded.add(count)
        if context.stop.is_set():
            raise Stopped

    file = context.out / "embeddings.npy"
    lost = embed_photos(
        photos,
        network,
        network.side,
        context.work / "embedded",
        file,
        where=f"stages.{context.name}.embedding",
        identity=json.dumps(
            [config.version, *([sha256_of(path) for path in paths] for paths in network.files().values())]
        ),
        device=context.elastic.device,
        step=step,
        begin_at=embedded.begin_at,
        actors=ray_processors(config.workers, context.name, len(photos)),
    )
    left = list(statuses)
    for number in lost:
        left[rows[number]] = replace(
            left[rows[number]], status="corrupt", reason="it cannot be read any more"
        )
    return open_vectors(file), left


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
    begin_at: Callable[[int], None] = lambda count: None,
    actors: int | None = None,
) -> list[int]:
    """Write the image features of photos, of length 1, to a `.npy` file: float32, one row a photo.

    Args:
        photos: in the order of rows.
        source: the network.
        size: pixels a side of the centred square that it sees.
        work: a folder for finished blocks, which a later run of the same photos takes up.
        target: the file.
        where: key path of the source, for error messages.
        identity: of the network and its weights: what another one said is not taken up. What this one said of a
            picture is remembered on this machine by the picture's content, whatever the data set.
        device: an `elastic.device`.
        step: is told of photos that are done, how many; raises to stop.
        begin_at: is told of photos that an earlier run has done, how many.
        actors: how many processes of the Ray cluster that this one is connected to hold the network at most. None: this
            process alone.

    Returns:
        The photos whose files cannot be read any more. They have no row.

    Raises:
        UserError: the network is not there, what it gives is not clear or not finite, or no photo can be read.
    """
    work.mkdir(parents=True, exist_ok=True)
    blocks = [photos[start : start + _BLOCK] for start in range(0, len(photos), _BLOCK)]
    files = [work / f"{_digest(block, source, size, identity)}.npy" for block in blocks]
    pixels = photos[0].pixels if photos else None
    embed = _Embedder(source, size, where, device, pixels, identity, _computes_on(device, actors))
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    begin_at(sum(len(block) for block, file in zip(blocks, files, strict=True) if file.is_file()))
    if actors is not None:
        _embed_on_ray(embed, {number: blocks[number] for number in missing}, files, actors, step)
        missing = []
    for number, read in zip(
        missing, _read_ahead([blocks[at] for at in missing], size, embed.cache), strict=True
    ):
        found_nD = embed(blocks[number], *read)
        _save(files[number], found_nD)
        step(len(found_nD))
    return _joined(files, target, where)


def _embed_on_ray(
    embed: _Embedder,
    blocks: Mapping[int, Sequence[PhotoFile]],
    files: Sequence[Path],
    actors: int,
    step: Callable[[int], None],
) -> None:
    """Make the files of blocks by actors of a Ray cluster; what is known of a block waits in a file beside it."""
    from orchestrator.stages.curate.embed_on_ray import embed_blocks

    asked: dict[int, list[PhotoFile]] = {}
    for number, block in blocks.items():
        known = embed.cache.find([_content(photo) for photo in block])
        unknown = [photo for photo in block if _content(photo) not in known]
        if unknown:
            asked[number] = unknown
        if known:
            found_nD = embed.joined(block, known)
            _save(_part(files[number]) if unknown else files[number], found_nD)
        step(len(block) - len(unknown))
    for number, readable, vectors_nD in embed_blocks(list(asked.items()), *embed.settings, actors):
        photos = [photo for photo, there in zip(asked[number], readable, strict=True) if there]
        fresh = list(zip(map(_content, photos), vectors_nD, strict=True))
        embed.cache.note(fresh)
        part = _part(files[number])
        before_nD = np.load(part, allow_pickle=False) if part.is_file() else None
        found_nD = embed.joined(blocks[number], dict(fresh), before_nD, vectors_nD.shape[1])
        _save(files[number], found_nD)
        part.unlink(missing_ok=True)
        step(len(asked[number]))


def _save(path: Path, vectors_nD: Floats) -> None:
    with replacing(path, only_writer=True) as draft, draft.open("wb") as file:
        np.save(file, vectors_nD)


def _part(file: Path) -> Path:
    return file.with_suffix(".known.npy")


class _Embedder:
    """Makes the vectors of blocks of photos. The network is opened when there is something to ask it."""

    def __init__(
        self,
        source: NetworkSource,
        size: int,
        where: str,
        device: str,
        pixels: PixelFormat | None,
        identity: str,
        computes_on: str,
    ) -> None:
        named = [_FORMAT, identity, source.identity(), size, computes_on]
        named += [*decoder_versions(), *_network_versions(source)]
        # What a user's own module computes may change with no file of its weights.
        own = source.module is not None
        self.cache = EmbeddingCache(None if own else json.dumps(named, sort_keys=True))
        self.settings = source, size, where, device, pixels
        self._open = partial(network_of, *self.settings)
        self._network: Callable[[Sequence[Pixels]], Floats] | None = None

    def __call__(
        self, block: Sequence[PhotoFile], known: Mapping[str, Floats], squares: Sequence[Pixels | None]
    ) -> Floats:
        """(n, D) float32; NaN where a photo cannot be read, so that the file says so by itself.

        Args:
            block: n photos.
            known: vectors of photos, by :func:`_content`.
            squares: of the others, in their order; None of those that cannot be read.
        """
        vectors = dict(known)
        asked = [photo for photo in block if _content(photo) not in known]
        if asked:
            self._network = self._network or self._open()
            readable = [
                (photo, square) for photo, square in zip(asked, squares, strict=True) if square is not None
            ]
            made_nD = self._network([square for _, square in readable])
            fresh = list(zip([_content(photo) for photo, _ in readable], made_nD, strict=True))
            self.cache.note(fresh)
            vectors |= fresh
        return self.joined(block, vectors, dim=made_nD.shape[1] if asked else 0)

    @staticmethod
    def joined(
        block: Sequence[PhotoFile],
        vectors: Mapping[str, Floats],
        before_nD: Floats | None = None,
        dim: int = 0,
    ) -> Floats:
        """The rows of a block: of `before_nD`, or NaN, where there is no vector by :func:`_content`."""
        dim = len(next(iter(vectors.values()), np.empty(dim)))
        found_nD = np.full((len(block), dim), np.nan, np.float32) if before_nD is None else before_nD.copy()
        for at, photo in enumerate(block):
            if (vector := vectors.get(_content(photo))) is not None:
                found_nD[at] = vector
        return found_nD


def _computes_on(device: str, actors: int | None) -> str:
    """`cuda` or `cpu`: what the network runs on, which rounds in its own way."""
    if actors is None:
        return device_type(device)
    from orchestrator.stages.curate.embed_on_ray import is_on_gpu

    return "cuda" if is_on_gpu(device) else "cpu"


def _network_versions(source: NetworkSource) -> list[str]:
    """The versions of torch, and of the package that has the code of the network."""
    found = [str(torch.__version__)]
    for package in ("timm", "transformers"):
        if getattr(source, package) is not None:
            # One that is not installed is an error once the network is opened.
            with contextlib.suppress(PackageNotFoundError):
                found.append(f"{package} {version(package)}")
    return found


def _content(photo: PhotoFile) -> str:
    """Tells what a photo's file holds and how it is seen from others: 64 hex digits."""
    if photo.pixels is None:
        return photo.sha256
    how = json.dumps(photo.pixels.record(), separators=(",", ":"))
    return hashlib.sha256(f"{photo.sha256} {how}".encode()).hexdigest()


def network_of(
    source: NetworkSource, size: int, where: str, device: str, pixels: PixelFormat | None
) -> Callable[[Sequence[Pixels]], Floats]:
    """Makes unit vectors (n, D) of squares, whose channels are those of `pixels`; none of none.

    Raises:
        UserError: the network is not there, or takes other channels than it would see.
    """
    source = as_recorded(source)
    try:
        source.channels(pixels)
    except UserError as error:
        raise UserError(error.what, where=f"{where}.{error.where}", hint=error.hint) from None
    net = open_network(source, size, f"the network {source.shown!r}", where).to(device_type(device))

    @torch.inference_mode()
    def vectors(squares: Sequence[Pixels]) -> Floats:
        found = [np.empty((0, net.dim), np.float32)]
        for start in range(0, len(squares), _BATCH):
            some = squares[start : start + _BATCH]
            # Always so many, so that a photo's vector is the same to the last bit whatever is beside it.
            full = [*some, *[np.zeros_like(some[0])] * (_BATCH - len(some))]
            images_NHWC = torch.from_numpy(np.stack(full))
            images_NCHW = images_NHWC.permute(0, 3, 1, 2).to(device_type(device))
            cls_ND = net(as_seen(images_NCHW, source, size, pixels)).cls.float()[: len(some)]
            if not torch.isfinite(cls_ND).all():
                raise UserError(
                    f"the network {source.shown!r} gives numbers that are not finite", where=where
                )
            found.append(torch.nn.functional.normalize(cls_ND, dim=1).cpu().numpy())
        return np.concatenate(found)

    return vectors


def _read_ahead(
    blocks: Sequence[Sequence[PhotoFile]], size: int, cache: EmbeddingCache
) -> Iterator[tuple[Mapping[str, Floats], list[Pixels | None]]]:
    """Of each block the vectors that are known, and the squares of the other photos; the next block is read meanwhile.

    A square is None where a file cannot be read.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ahead: list[tuple[Mapping[str, Floats], list[Future[Pixels | None]]]] = []
        for number, block in enumerate([*blocks, ()]):
            known = cache.find([_content(photo) for photo in block])
            unknown = [photo for photo in block if _content(photo) not in known]
            ahead.append((known, [pool.submit(square_of, photo, size) for photo in unknown]))
            if number:
                vectors, futures = ahead.pop(0)
                yield vectors, [future.result() for future in futures]


def square_of(photo: PhotoFile, size: int) -> Pixels | None:
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
        # Of a block without any photo that can be read the length of vectors may not be known.
        there_n = ~np.isnan(block_nD).any(1) & (block_nD.shape[1] > 0)
        lost += (first + np.flatnonzero(~there_n)).tolist()
        first, total = first + len(block_nD), total + int(there_n.sum())
        width = max(width, block_nD.shape[1])
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
    named += [[photo.sha256, photo.pixels and photo.pixels.record()] for photo in block]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]
