"""The embedding pass on Ray Data: actors on all machines of a cluster hold the network and read the photos.

Photos come in blocks, and each block that is done is handed over at once, in any order: so a run that is cut off goes
on after the blocks that are done, and memory does not grow with the photos. A block whose actor or machine is lost is
done again by another one. Results are those of a single process but for what another machine's linear algebra rounds
otherwise.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
import ray.data

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.decode import Pixels
from orchestrator.stages.common.network_source import NetworkSource
from orchestrator.stages.curate.embed import Floats, PhotoFile, network_of, square_of

# Threads of an actor that read photos while its processor waits for their files.
_READERS = 4


class NetworkActor:
    """Holds the network; of a batch of one block it makes the block's vectors."""

    def __init__(
        self, source: dict[str, Any], size: int, where: str, device: str, pixels: dict[str, Any] | None
    ) -> None:
        how = pixels and PixelFormat.model_validate(pixels)
        self._network = network_of(NetworkSource.model_validate(source), size, where, device, how or None)
        self._size = size

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"number": [], "vectors": [], "readable": []}
        for number, photos in zip(batch["number"], batch["photos"], strict=True):
            asked = [PhotoFile.of(one) for one in json.loads(photos)]
            with ThreadPoolExecutor(_READERS) as pool:
                squares: list[Pixels | None] = list(
                    pool.map(lambda photo: square_of(photo, self._size), asked)
                )
            vectors_nD = self._network([square for square in squares if square is not None])
            found["number"].append(int(number))
            found["vectors"].append(vectors_nD.astype("<f4").tobytes())
            found["readable"].append(bytes(square is not None for square in squares))
        return found


def is_on_gpu(device: str) -> bool:
    """Whether actors for this `elastic.device` hold the network on GPUs of the cluster."""
    return device == "gpu" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)


def record_of(source: NetworkSource) -> dict[str, Any]:
    """A source as plain JSON, without defaults: a mean that nobody gave is that of the network's folder."""
    return source.model_dump(mode="json", by_alias=True, exclude_unset=True)


def embed_blocks(
    blocks: Sequence[tuple[int, Sequence[PhotoFile]]],
    source: NetworkSource,
    size: int,
    where: str,
    device: str,
    pixels: PixelFormat | None,
    actors: int,
) -> Iterator[tuple[int, list[bool], Floats]]:
    """The vectors of blocks of photos, as they are done, by actors of the cluster that this process is connected to.

    Args:
        blocks: number and photos of each.
        source, size, where, device: of the network, see :func:`orchestrator.stages.curate.embed.embed_photos`.
        pixels: which bands the channels of the photos are; None for 8-bit RGB.
        actors: how many hold the network at most; each asks for a processor, or for a GPU.

    Returns:
        Number of the block, which of its photos can be read, and the vectors (n, D) of these.
    """
    if not blocks:
        # Ray Data refuses a table without rows.
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [
        {"number": number, "photos": json.dumps([photo.record() for photo in photos])}
        for number, photos in blocks
    ]
    on_gpu = is_on_gpu(device)
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        NetworkActor,
        fn_constructor_args=(
            record_of(source),
            size,
            where,
            device,
            pixels and pixels.record(),
        ),
        batch_size=1,
        concurrency=(1, max(1, min(actors, len(rows)))),
        num_gpus=1 if on_gpu else 0,
        num_cpus=0 if on_gpu else 1,
    )
    for batch in done.iter_batches(batch_size=1, batch_format="pandas", prefetch_batches=0):
        for number, data, readable in zip(batch["number"], batch["vectors"], batch["readable"], strict=True):
            there = [bool(one) for one in readable]
            count = sum(there)
            vectors = np.frombuffer(data, "<f4")
            yield int(number), there, vectors.reshape(count, -1) if count else np.empty((0, 0), np.float32)
