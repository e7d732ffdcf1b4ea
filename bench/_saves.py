"""One worker of `bench checkpoint`, `python -m bench._saves SPEC.json RANK`: windows of training, one save in each.

All arms take turns in one process on one engine, so that nothing but the save differs between two windows.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.config.schedules import Optimizer
from orchestrator.models.blocks import TransformerBlock
from orchestrator.models.configs import ViTConfig
from orchestrator.models.presets import preset
from orchestrator.models.vit import VisionTransformer
from orchestrator.training.checkpoint import reader, shard_file
from orchestrator.training.checkpoint.storage import CheckpointStorage
from orchestrator.training.checkpoint.writer import CheckpointWriter
from orchestrator.training.engine import build_engine
from orchestrator.training.task import Modules
from orchestrator.training.zero import import_deepspeed

NEVER, AGAIN, BEHIND, WAITING, TORCH = (
    "never saving",
    "never saving, again",
    "ours, behind training's back",
    "ours, waited for",
    "torch DCP, waited for",
)
ARMS = (NEVER, AGAIN, BEHIND, WAITING, TORCH)


class Student(nn.Module):
    """A tower whose loss is a number; what it learns is of no interest here."""

    def __init__(self, name: str) -> None:
        super().__init__()
        config = preset(name)
        assert isinstance(config, ViTConfig)
        self.tower = VisionTransformer(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tower(images).cls.float().square().mean()  # type: ignore[no-any-return]


class Windows:
    """Fixed numbers of training steps, timed, each with one of the ways to save in it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.folder, self.rank = Path(spec["folder"]), dist.get_rank()
        self.images = torch.randn(2, 3, 96, 96)
        self.engine = build_engine(
            Modules(
                Student(spec["model"]), ema=Student(spec["model"]), zero3_leaf_modules=(TransformerBlock,)
            ),
            Optimizer.model_validate({"lr": {"peak": 1e-4}}),
            zero_stage=3,
            precision="fp32",
            num_blocks=dist.get_world_size(),
        )
        self.cpu_s = 0.0
        shard_file.write_file = self._counted(shard_file.write_file)
        self.storage = CheckpointStorage(self.folder / "ours")
        self.writer = CheckpointWriter(
            self.storage,
            token=reader.share(self.storage.acquire() if self.rank == 0 else None),
            keep=1,
            keep_every=None,
            meta={},
        )
        self.updates = 0
        self.saves: dict[str, Callable[[], None]] = {
            NEVER: lambda: None,
            AGAIN: lambda: None,
            BEHIND: lambda: self.writer.begin(self.engine, self.updates),
            WAITING: self._save_and_wait,
            TORCH: self._save_with_torch,
        }

    def _counted(self, write: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def counted(*args: Any) -> dict[str, Any]:
            before = time.thread_time()
            digest = write(*args)
            self.cpu_s = time.thread_time() - before
            return digest

        return counted

    def step(self) -> None:
        """One update, and what the training loop agrees on after it."""
        self.engine.backward(self.engine.modules.trainable(self.images))
        self.engine.step(1e-4, self.updates, 0.04)
        self.engine.update_ema(0.99)
        self.updates += 1
        written = torch.tensor(float(self.writer.pending is not None and self.writer.written()))
        dist.all_reduce(written, dist.ReduceOp.MIN)
        if written:
            self.writer.commit()

    def window(self, arm: str, steps: int) -> dict[str, float]:
        """Wall seconds of `steps` steps with one save after the first, until all of it is durable."""
        if self.rank == 0:
            shutil.rmtree(self.folder / "torch", ignore_errors=True)
        dist.barrier()
        started = time.perf_counter()
        self.step()
        self.saves[arm]()
        for _ in range(steps - 1):
            self.step()
        if self.writer.pending is not None:
            self.writer.wait()
            dist.barrier()
            self.writer.commit()
        self.writer.finish()
        dist.barrier()
        return {
            "wall_s": time.perf_counter() - started,
            "stall_s": self.writer.last_stall_s,
            "write_s": self.writer.last_write_s,
            "cpu_s": self.cpu_s,
        }

    def _save_and_wait(self) -> None:
        self.writer.begin(self.engine, self.updates)
        self.writer.wait()
        dist.barrier()
        self.writer.commit()
        self.writer.finish()
        dist.barrier()

    def _save_with_torch(self) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        state = {
            key: DTensor.from_local(
                shard.data, mesh, [Shard(0)], run_check=False, shape=torch.Size([shard.numel]), stride=(1,)
            )
            for key, shard in reader.shards(self.engine)
        }
        save(
            state, storage_writer=HuggingFaceStorageWriter(str(self.folder / "torch"), save_distributed=True)
        )


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """All rounds; the order of the arms is rotated by one each round."""
    windows = Windows(spec)
    for _ in range(3):
        windows.step()
    started = time.perf_counter()
    for _ in range(3):
        windows.step()
    steps = reader.share(max(3, round(spec["window_s"] / ((time.perf_counter() - started) / 3))))
    first = windows.window(BEHIND, 3)  # its buffer is made here, and every arm's imports
    windows.window(TORCH, 3)
    rounds = []
    for number in range(spec["rounds"]):
        order = ARMS[number % len(ARMS) :] + ARMS[: number % len(ARMS)]
        rounds.append({arm: windows.window(arm, steps) for arm in order})
    return {"steps": steps, "bytes": windows.writer.last_bytes, "first": first, "rounds": rounds}


def main() -> None:
    spec, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{spec['folder']}/rendezvous", rank=rank, world_size=spec["world"]
    )
    import_deepspeed().init_distributed("gloo", dist_init_required=False, verbose=False)
    result = measure(spec)
    if rank == 0:
        Path(spec["folder"], "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
