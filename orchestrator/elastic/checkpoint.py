"""Elastic checkpoints: flat 1-D `DTensor` shards in distributed safetensors, loadable at any worker count.

A checkpoint is a folder `step-00000040/` of safetensors files and a `checkpoint.json` that is renamed into place
last: without it the folder does not exist for anybody. It names every file with its size and sha256, so a torn
or altered checkpoint is seen and the next older one is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from orchestrator.elastic.engine import Engine
from orchestrator.elastic.shards import Shard

logger = logging.getLogger("orchestrator")

COMMIT = "checkpoint.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: its folder and what its `checkpoint.json` says."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.meta["step"])


def save(folder: Path, engine: Engine, step: int, *, meta: dict[str, Any], keep: int) -> None:
    """Write the checkpoint after `step` updates and commit it; collective over all workers."""
    target = folder / f"step-{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    state = _state(engine, _mesh())
    save_state(state, storage_writer=HuggingFaceStorageWriter(str(target), save_distributed=True))
    dist.barrier()
    if dist.get_rank() == 0:
        # Updates outlive a stage, steps do not: AdamW's bias correction goes by all updates ever made.
        counts = {"step": step, "updates": engine.updates, "num_workers": dist.get_world_size()}
        _commit(target, counts | meta)
        prune(folder, keep)
    dist.barrier()


def restore(saved: Saved, engine: Engine) -> int:
    """Load `saved` into `engine` at whatever worker count runs now; returns the steps done. Collective."""
    reader = HuggingFaceStorageReader(str(saved.path))
    known = reader.read_metadata().state_dict_metadata
    # A stage may add a copy (a Gram teacher) to what it starts from; the task built that one itself.
    state = {
        key: value
        for key, value in _state(engine, _mesh(), fresh=True).items()
        if key in known or not key.startswith("copies.")
    }
    load_state(state, storage_reader=reader)
    local = {key: value.to_local() for key, value in state.items()}

    def part(kind: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{kind}/"): value for key, value in local.items() if key.startswith(f"{kind}/")
        }

    engine.load(part("master"), {key: part(key) for key in _MOMENTS}, int(saved.meta["updates"]))
    if engine.modules.ema is not None:
        for name, value in part("ema").items():
            engine.ema[name].copy_(value)
        engine.write(engine.modules.ema, engine.ema)
    for name, module in engine.modules.copies.items():
        engine.write(module, part(f"copies.{name}"))
    return saved.step


def latest(folder: Path) -> Saved | None:
    """The newest checkpoint below `folder` that is committed and whose files are all as written."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return verified(path)
        except (OSError, ValueError) as error:
            logger.warning("checkpoint %s is passed over: %s", path, error)
    return None


def verified(path: Path) -> Saved:
    """The checkpoint at `path`.

    Raises:
        ValueError: it is not committed, or a file's size or sha256 differs; says which.
    """
    if not (path / COMMIT).exists():
        raise ValueError("it was never committed")
    meta = json.loads((path / COMMIT).read_text())
    for name, entry in meta["files"].items():
        file = path / name
        if not file.exists():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != entry["size"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes instead of {entry['size']}")
        if _sha256(file) != entry["sha256"]:
            raise ValueError(f"{name} differs from its sha256")
    return Saved(path, meta)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` committed checkpoints, and whatever was never committed."""
    committed = sorted(path for path in folder.glob("step-*") if (path / COMMIT).exists())
    for path in folder.glob("step-*"):
        if path not in committed[-keep:]:
            # Uncommit first: a kill in the middle of the removal must not leave a torn but committed folder.
            (path / COMMIT).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu" if dist.get_backend() == "gloo" else "cuda", (dist.get_world_size(),))


def _state(engine: Engine, mesh: DeviceMesh, *, fresh: bool = False) -> dict[str, DTensor]:
    state = {}
    for key, shard in _shards(engine, fresh=fresh):
        # Empty tail shards included: DTensor's Shard(0) gives short or empty pieces to the last workers too.
        data = torch.empty_like(shard.data) if fresh else shard.data
        state[key] = DTensor.from_local(
            data, mesh, [ShardPlacement(0)], run_check=False, shape=torch.Size([shard.numel]), stride=(1,)
        )
    return state


def _shards(engine: Engine, *, fresh: bool) -> Iterator[tuple[str, Shard]]:
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


def _commit(target: Path, meta: dict[str, Any]) -> None:
    files = {
        str(file.relative_to(target)): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(target.rglob("*"))
        if file.is_file()
    }
    draft = target / f".{COMMIT}"
    draft.write_text(json.dumps({**meta, "files": files}, indent=1))
    draft.replace(target / COMMIT)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
