"""Elastic checkpoints: each worker's flat 1-D shards in one safetensors file, loadable at any worker count.

Worker r of W holds elements [r·n, min(N, (r+1)·n)) with n = ceil(N/W) of every saved tensor of N elements. A
worker of another count finds the parts of its own range by arithmetic and reads those slices; no conversion,
no pickle. The header says where in the tensor each shard lies, in the form that the Hugging Face reader of
`torch.distributed.checkpoint` understands. See `format.py` for the files and `writer.py` for writing them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.byte_counts import BYTES
from orchestrator.storage.store import HasRanges
from orchestrator.training.checkpoint.format import (
    CheckpointError,
    CheckpointManifest,
    LaterFormatError,
    step_name,
)
from orchestrator.training.checkpoint.own_parts import OwnParts
from orchestrator.training.checkpoint.partition import Shard
from orchestrator.training.checkpoint.storage import CheckpointStorage
from orchestrator.training.engine import Engine

logger = logging.getLogger("orchestrator")

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of saved worker `rank`'s shard go to [into, into + stop - start) of this one's."""

    rank: int
    start: int
    stop: int
    into: int


def overlaps(numel: int, saved_world: int, rank: int, world: int) -> list[Slice]:
    """Where worker `rank` of `world` finds its part of a tensor of `numel` elements that `saved_world` wrote."""
    size, saved_size = -(-numel // world), -(-numel // saved_world)
    first, last = min(rank * size, numel), min((rank + 1) * size, numel)
    found = []
    while first < last:
        writer = first // saved_size
        stop = min(last, (writer + 1) * saved_size)
        offset = writer * saved_size
        found.append(Slice(writer, first - offset, stop - offset, first - min(rank * size, numel)))
        first = stop
    return found


def shards(engine: Engine, *, fresh: bool = False) -> Iterator[tuple[str, Shard]]:
    """All this worker must save, by key; collective at ZeRO 1 and 2.

    With `fresh` moments are stood in for by the weights: same key and place, for an optimizer that has none yet.
    """
    for shard in engine.master():
        yield f"master/{shard.name}", shard
        for key in _MOMENTS if fresh else ():
            yield f"{key}/{shard.name}", shard
        if shard.name in engine.ema:
            ema = engine.ema[shard.name]
            yield f"ema/{shard.name}", Shard(shard.name, ema, shard.offset, shard.numel, shard.shape)
    for key in () if fresh else _MOMENTS:
        for shard in engine.moments(key):
            yield f"{key}/{shard.name}", shard
    for name, module in engine.modules.copies.items():
        for shard in engine.read(module):
            yield f"copies.{name}/{shard.name}", shard


def share(value: Any, device: str = "cpu") -> Any:
    """Worker 0's JSON `value`, on every worker; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([text.numel()], device=device)
    dist.broadcast(length, 0)
    if dist.get_rank() != 0:
        text = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.cpu().numpy()))


def newest(
    storage: CheckpointStorage, rank: int, world: int, agree: Callable[[bool], bool], device: str = "cpu"
) -> CheckpointManifest | None:
    """The newest good checkpoint, the same for all workers, its files at hand for this one's :func:`restore`.

    Bad ones are logged with the file and what is wrong with it, and passed over. Collective.

    Args:
        agree: the AND of all workers' answers.
        device: of the tensors that workers exchange.

    Raises:
        CheckpointError: on all workers, if one of them cannot reach the checkpoints or has no room for them.
            That is no reason to take an older one, let alone to start anew.
    """
    steps: list[int] = []
    trouble = None
    if rank == 0:
        try:
            steps = storage.committed()
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
    steps, trouble = share([steps, trouble], device)
    if trouble is not None:
        raise CheckpointError(f"the checkpoints in {storage.folder} cannot be listed: {trouble}")
    for step in steps:
        found, wrong, trouble = _manifest(storage, step) if rank == 0 else (None, None, None)
        found, wrong, trouble = share([found, wrong, trouble], device)
        manifest = CheckpointManifest(storage.folder / step_name(step), found) if found is not None else None
        if manifest is not None:
            wrong, trouble = _examine(storage, manifest, rank, world)
        if not agree(trouble is None):
            raise CheckpointError(
                f"checkpoint {step} cannot be read: {trouble or 'see the message of another worker'}"
            )
        if agree(wrong is None):
            return manifest
        if wrong is not None and (rank == 0 or manifest is not None):
            logger.warning("checkpoint %s is skipped: %s", storage.folder / step_name(step), wrong)
    return None


_Findings = tuple[str | None, str | None]


def _manifest(storage: CheckpointStorage, step: int) -> tuple[dict[str, Any] | None, str | None, str | None]:
    try:
        return storage.find(step).meta, None, None
    except LaterFormatError as error:
        return None, None, f"{error}; go on with the version of orchestrator that wrote it, or a later one"
    except CheckpointError as error:
        return None, str(error), None
    except Exception as error:
        return None, None, f"{type(error).__name__}: {error}"


def _examine(storage: CheckpointStorage, manifest: CheckpointManifest, rank: int, world: int) -> _Findings:
    """What is wrong with this worker's files of `manifest`, and why it cannot tell; None and None if all is well."""
    if storage.store is not None:
        # Each worker may be on a machine of its own: it fetches what it will read, and that is what it checks.
        writers = {
            part.rank
            for numel in manifest.keys.values()
            for part in overlaps(numel, manifest.world, rank, world)
        }
        names = [manifest.shard(writer) for writer in sorted(writers)]
    else:
        names = sorted(manifest.files)[rank::world]
    try:
        for name in names:
            storage.fetch(manifest, name)
    except CheckpointError as error:
        return str(error), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return None, None


def restore(
    manifest: CheckpointManifest,
    engine: Engine,
    *,
    compare: bool = False,
    stored: tuple[HasRanges, str] | None = None,
) -> int:
    """Load `manifest` into `engine` at whatever worker count runs now; returns the steps done. Collective.

    Args:
        manifest: of the checkpoint, whose files are in its folder.
        engine: what it is loaded into.
        compare: compare what this worker reads with the manifest: nobody has compared the files yet.
        stored: the store and the prefix of the files where they are not in the folder; only with `compare`.

    Raises:
        CheckpointError: it holds other tensors than the engine's, or what was read is not what was written.
    """
    known = manifest.keys
    local: dict[str, Tensor] = {}
    wanted: dict[int, list[tuple[str, Slice]]] = {}
    for key, shard in shards(engine, fresh=True):
        if key not in known and key.startswith("copies."):
            # A stage may add a copy (a Gram teacher) to what it starts from; the task built that one itself.
            continue
        if known.get(key) != shard.numel:
            held = f"has {known[key]} elements of" if key in known else "lacks"
            raise CheckpointError(f"it {held} {key}, where the model has {shard.numel} elements")
        local[key] = torch.empty_like(shard.data)
        for part in overlaps(shard.numel, manifest.world, dist.get_rank(), dist.get_world_size()):
            wanted.setdefault(part.rank, []).append((key, part))
    for writer, parts in wanted.items():
        if compare:
            _read_compared(manifest, writer, parts, local, stored)
        else:
            _read(manifest, writer, parts, local)
    _put(engine, local, int(manifest.meta["updates"]))
    return manifest.step


def _read(
    manifest: CheckpointManifest, writer: int, parts: list[tuple[str, Slice]], local: dict[str, Tensor]
) -> None:
    from safetensors import safe_open

    with safe_open(manifest.path / manifest.shard(writer), framework="pt") as file:
        for key, part in parts:
            into = local[key][part.into : part.into + part.stop - part.start]
            into.copy_(file.get_slice(key)[part.start : part.stop])
            BYTES.read("checkpoint", into.nbytes)


def _read_compared(
    manifest: CheckpointManifest,
    writer: int,
    parts: list[tuple[str, Slice]],
    local: dict[str, Tensor],
    stored: tuple[HasRanges, str] | None,
) -> None:
    name = manifest.shard(writer)
    with OwnParts(manifest.path, name, manifest.files[name], stored) as file:
        if missing := [key for key, _ in parts if not file.has(key)]:
            raise CheckpointError(f"{name} lacks {missing[0]}")
        for key, part in sorted(parts, key=lambda one: file.place(one[0])):
            into = local[key][part.into : part.into + part.stop - part.start]
            into.copy_(torch.frombuffer(file.elements(key, part.start, part.stop), dtype=torch.float32))
        logger.info("%d of %d bytes of %s were read", file.bytes_read, manifest.files[name]["size"], name)


def _put(engine: Engine, local: dict[str, Tensor], updates: int) -> None:
    def part(kind: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{kind}/"): value for key, value in local.items() if key.startswith(f"{kind}/")
        }

    engine.load(part("master"), {key: part(key) for key in _MOMENTS}, updates)
    if engine.modules.ema is not None:
        engine.load_ema(part("ema"))
    for name, module in engine.modules.copies.items():
        engine.write(module, part(f"copies.{name}"))
