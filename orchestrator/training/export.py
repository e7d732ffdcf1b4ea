"""Weights out of a job: one safetensors file of whole fp32 tensors, visible only when complete."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from orchestrator.byte_counts import BYTES
from orchestrator.fsio import make_folder, replacing
from orchestrator.training.checkpoint.partition import Shard, gather_all
from orchestrator.training.engine import Engine
from orchestrator.training.handed_over import compare, note


def export_ema(engine: Engine, path: Path, step: int) -> None:
    """Write the EMA (the weights, where a job keeps none) after `step` updates; collective.

    Tensors are joined and written one group after the other: no worker holds all of them. The file is byte for byte
    what `safetensors` writes. It is hashed while it is written, see :mod:`handed_over`.
    """
    shards = sorted(engine.average(), key=lambda shard: shard.name)
    digest = hashlib.sha256()
    with ExitStack() as stack:
        file = None
        if dist.get_rank() == 0:
            # Durable: `Job.is_done` takes a file of this name for a whole one.
            make_folder(path.parent)
            file = stack.enter_context(stack.enter_context(replacing(path, only_writer=True)).open("wb"))
            header = _header(shards, {"step": str(step)})
            file.write(header)
            digest.update(header)
        parts, numels = ({s.name: s.data for s in shards}, {s.name: s.numel for s in shards})
        for _, whole in gather_all(parts, numels):
            if file is not None:
                data = whole.cpu().contiguous().numpy().data
                file.write(data)
                digest.update(data)
    if dist.get_rank() == 0:
        note(path, digest.hexdigest())
    dist.barrier()


def _header(shards: Iterable[Shard], metadata: Mapping[str, str]) -> bytes:
    """Of a safetensors file of fp32 tensors in this order, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for shard in shards:
        start, end = end, end + 4 * shard.numel
        header[shard.name] = {"dtype": "F32", "shape": list(shard.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def load_export(path: Path, prefix: str = "", sha256: str | None = None) -> Mapping[str, Tensor]:
    """The tensors of an export below `prefix`, with the prefix removed; the others are not read.

    Args:
        path: of the export.
        prefix: of the names.
        sha256: what all of the file is compared with first; None where somebody has compared it.

    Raises:
        UserError: it is damaged.
    """
    if sha256 is not None:
        compare(path.parent, {path.name: sha256})
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118, it is not a mapping
        found: dict[str, Tensor] = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    BYTES.read("checkpoint", sum(value.nbytes for value in found.values()))
    return found
