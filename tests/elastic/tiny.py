"""A job that takes no time: a linear model on numbers that follow from step and block. Found by workers' PYTHONPATH."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from torch import Tensor, nn

from orchestrator.config.elastic import Elastic
from orchestrator.config.schedules import Optimizer, Schedule
from orchestrator.data.blocks import Block
from orchestrator.errors import UserError
from orchestrator.training.job import Job
from orchestrator.training.task import BlockTensors, Losses, Modules, Reduce, Weights


class TinyBlocks:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def load(self, step: int, index: int) -> Block:
        rng = np.random.default_rng([step, index])
        x = rng.normal(size=(4, 8)).astype(np.float32)
        return Block(step, index, np.arange(4) + 4 * index + 100 * step, {"x": x})


class TinyTask:
    """Learns y = 2x. `faults` is a folder: a file `raise-7` there makes step 7 raise, once or always; see `_fault`."""

    def __init__(self, faults: Path, step_s: float) -> None:
        self.faults, self.step_s = faults, step_s

    def build(self, device: str) -> Modules:
        net, ema = nn.Linear(8, 8), nn.Linear(8, 8)
        ema.load_state_dict(net.state_dict())
        self.modules = Modules(net, ema=ema)
        return self.modules

    def prepare_step(self, step: int) -> None:
        _fault(self.faults, step)
        time.sleep(self.step_s)

    def targets(self, blocks: Sequence[BlockTensors], reduce: Reduce) -> list[Tensor]:
        return [2 * block.tensors["x"] for block in blocks]

    def losses(self, block: BlockTensors, target: Tensor) -> Losses:
        error = (self.modules.trainable(block.tensors["x"]) - target).square().mean()
        return Losses(error, {"error": error})

    def after_step(self, step: int, weights: Weights, metrics: Mapping[str, float]) -> None:
        weights.update_ema(0.9)


class DeviceTask(TinyTask):
    """A `TinyTask` that keeps what its process computes on, and what it was given, in `faults`/device."""

    def build(self, device: str) -> Modules:
        given = [os.environ.get(name) for name in ("ORCHESTRATOR_GPUS", "CUDA_VISIBLE_DEVICES")]
        (self.faults / "device").write_text(json.dumps([device, *given]))
        return super().build(device)


def _fault(folder: Path, step: int) -> None:
    """`once-…` files are eaten by whoever meets them first; `hold-…` holds the step up until it is removed."""
    while (folder / f"hold-{step}").exists():
        time.sleep(0.02)
    for name in (f"raise-{step}", f"once-raise-{step}", f"mistake-{step}", f"once-hang-{step}"):
        path = folder / name
        try:
            if name.startswith("once"):
                path.unlink()
            elif not path.exists():
                continue
        except FileNotFoundError:
            continue
        if "raise" in name:
            raise ValueError(f"no good at step {step}")
        if "mistake" in name:
            raise UserError("the photos are gone", where="data.photos", hint="bring them back")
        time.sleep(3600)


def tiny_job(
    work: Path, steps: int, workers: Any, *, num_blocks: int = 5, step_s: float = 0.05, **elastic: Any
) -> Job:
    faults = work.with_name(work.name + "-faults")
    faults.mkdir(parents=True, exist_ok=True)
    return Job(
        name=work.name,
        task=partial(TinyTask, faults, step_s),
        blocks=partial(TinyBlocks, num_blocks),
        num_blocks=num_blocks,
        num_steps=steps,
        optimizer=Optimizer(lr=Schedule(peak=1e-2)),
        zero_stage=3,
        precision="fp32",
        work=work,
        seed=0,
        elastic=Elastic(workers=workers, resize_share=1.0, **elastic),
    )


class Seen(UserCallback):  # type: ignore[misc]
    """Writes what Ray Train tells a callback beside the job's work."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with checkpoint.as_directory() as folder:
            pointer = json.loads((Path(folder) / "pointer.json").read_text())
        self._write(run_context, {"step": metrics[0]["step"], "uri": pointer["uri"]})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._write(run_context, {"failed": sorted(worker_exceptions)})

    def _write(self, run_context: Any, record: dict[str, Any]) -> None:
        work = Path(run_context.get_run_config().storage_path).parent
        with (work / "callback.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


class Broken(ControllerCallback):  # type: ignore[misc]
    """Raises whenever there is something to say."""

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        raise ValueError("no use")
