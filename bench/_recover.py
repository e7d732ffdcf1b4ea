"""What the drivers of `bench/recover.py` run: one driver is one arm's `python` beside a cluster of several machines.

`python bench/_recover.py ARM ADDRESS INDEX WORK` needs nothing of this folder, so an earlier checkout can run it too.
Every arm writes each step with its time to `WORK/steps.jsonl` and ends when there is a file `WORK/stop`.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.tracking.run import NullRun

STAGES, STAGE_STEPS = 5, 8
_PRELOAD = ("orchestrator.stages.common.crops", "orchestrator.stages.ssl.task")


def drive(arm: str, address: str, index: Path, work: Path) -> None:
    """Train as `arm` does until there is a file `stop` in `work`.

    Args:
        arm: `ours` (Ray Train with warm workers), `stock` (the same with `workers_from: stock`), `untouched`
            (TorchTrainer), or `stages` (several short stages one after the other, with warm workers).
        address: of the cluster.
        index: folder with the index of photographs.
        work: the arm's folder.
    """
    match arm:
        case "ours":
            _drive_ours(address, index, work)
        case "stock":
            _drive_ours(address, index, work, workers_from="stock")
        case "untouched":
            _drive_untouched(address, index, work)
        case "stages":
            _drive_stages(address, index, work)
        case _:
            raise SystemExit(f"there is no arm {arm!r}")


# --- what is trained ----------------------------------------------------------------------------------------------


def _job(index: Path, work: Path, **elastic: Any) -> Any:
    from orchestrator.config.elastic import Elastic
    from orchestrator.stages.common.config import ModelRecipe
    from orchestrator.stages.common.crops import crop_blocks
    from orchestrator.stages.ssl.pretrain import Pretrain
    from orchestrator.stages.ssl.task import SelfSupervisedTask
    from orchestrator.training.job import Job

    config = Pretrain.model_validate(
        {
            "kind": "pretrain",
            "model": "vit_pico",
            "steps": 100_000,
            "batch_size": 16,
            "block_size": 8,
            "crops": {"global_size": 64, "local_size": 32, "num_local": 2},
            "optimizer": {"lr": {"peak": 1e-3}},
        }
    )
    recipe = ModelRecipe(model="vit_pico", drop_path=0.0, heads=config.heads, global_size=64)
    return Job(
        name="recover",
        task=partial(SelfSupervisedTask, config, recipe, 7, None),
        blocks=partial(crop_blocks, config, recipe, index, 7),
        num_blocks=2,
        num_steps=config.steps,
        optimizer=config.optimizer,
        zero_stage=3,
        precision="fp32",
        work=work,
        seed=0,
        # Growth is not what is waited for here, only what it costs: it may come as often as it likes.
        elastic=Elastic(workers=(1, 2), checkpoint_every_s=5.0, resize_share=1.0, **elastic),
    )


class _Note:
    """Writes down each step and its time, for all arms alike."""

    def __init__(self, work: Path) -> None:
        self._file = (work / "steps.jsonl").open("a")

    def __call__(self, step: int, world: int) -> None:
        self._file.write(json.dumps({"time": time.time(), "step": step, "world": world}) + "\n")
        self._file.flush()


class _Noting(NullRun):
    """A run without MLflow that notes each step."""

    def __init__(self, work: Path) -> None:
        self._note = _Note(work)
        self._world = 0

    def metrics(self, values: Mapping[str, float], step: int, channel: str = "train") -> bool:
        """See :class:`orchestrator.tracking.run.Run`."""
        if channel == "train":
            self._note(step, self._world)
        elif channel == "goodput":
            self._world = int(values["workers"])
        return True


def _stop_by_file(work: Path, stop: Callable[[], None]) -> None:
    while not (work / "stop").exists():
        time.sleep(0.1)
    stop()


# --- our arms -----------------------------------------------------------------------------------------------------


def _drive_ours(address: str, index: Path, work: Path, **elastic: Any) -> None:
    from orchestrator.config.schema import Cluster
    from orchestrator.elastic import cluster
    from orchestrator.errors import Stopped

    stop = threading.Event()
    threading.Thread(target=_stop_by_file, args=(work, stop.set), daemon=True).start()
    with cluster.start(Cluster(address=address), preload=_PRELOAD), suppress(Stopped):
        _run()(_job(index, work, **elastic), tracker=_Noting(work), stop=stop)


def _drive_stages(address: str, index: Path, work: Path) -> None:
    """Stages of a few steps; the end of each is written to `ends.jsonl`."""
    from orchestrator.config.schema import Cluster
    from orchestrator.elastic import cluster

    with (
        cluster.start(Cluster(address=address), preload=_PRELOAD),
        (work / "ends.jsonl").open("w", buffering=1) as ends,
    ):
        for number in range(STAGES):
            folder = work / f"stage-{number}"
            folder.mkdir()
            job = replace(_job(index, folder), name=folder.name, num_steps=STAGE_STEPS)
            _run()(job, tracker=_Noting(work), stop=threading.Event())
            ends.write(json.dumps({"time": time.time()}) + "\n")


def _run() -> Callable[..., Any]:
    """`run` of the checkout that this runs in; before Ray Train held the controller it was elsewhere."""
    with suppress(ImportError):
        return importlib.import_module("orchestrator.elastic.trainer").run  # type: ignore[no-any-return]
    return importlib.import_module("orchestrator.elastic.controller").run  # type: ignore[no-any-return]


# --- what a user would do instead ---------------------------------------------------------------------------------


def _drive_untouched(address: str, index: Path, work: Path) -> None:
    """`TorchTrainer` at its defaults, with the same loop and the same checkpoints."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=address)
    trainer = TorchTrainer(
        _untouched_worker,
        train_loop_config={"job": _job(index, work), "work": work},
        scaling_config=ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name="untouched",
            storage_path=str(work),
            failure_config=FailureConfig(max_failures=10),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}},
        ),
    )
    threading.Thread(target=trainer.fit, daemon=True).start()
    done = threading.Event()
    _stop_by_file(work, done.set)
    ray.shutdown()


def _untouched_worker(config: dict[str, Any]) -> None:
    import torch

    from orchestrator.training.loop import train
    from orchestrator.training.zero import import_deepspeed

    torch.set_num_threads(1)
    import_deepspeed().init_distributed("gloo", dist_init_required=False, verbose=False)
    train(config["job"], _UntouchedLine(config["work"]))


class _UntouchedLine:
    """Reports to nobody, and notes each step."""

    def __init__(self, work: Path) -> None:
        self._note = _Note(work)

    def phase(self, name: str) -> None: ...

    def report(
        self, step: int, figures: dict[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        import torch.distributed as dist

        self._note(step, dist.get_world_size())

    def looked(self, step: int, held_out: Mapping[str, float]) -> None: ...

    def recorded(self, step: int) -> bool:
        return True

    def saved(self, step: int, figures: dict[str, float]) -> None: ...

    def trouble(self, what: str) -> None: ...

    def stop_requested(self) -> bool:
        return False


if __name__ == "__main__":
    drive(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
