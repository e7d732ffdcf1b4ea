"""Kill a machine, count the seconds to the next optimiser step: our elastic job beside stock Ray Train.

Both arms train the same task with the same loop and the same checkpoints on the same cluster of a head and two
machines; a machine is killed (SIGKILL: raylet, workers and all) in the middle of a step. The stock arm is
`TorchTrainer` with `num_workers=(1, 2)` and default settings.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import Claim, summarize

_STEPS_BEFORE = 8
_PATIENCE_S = 240.0
_PARTS = ("detect", "decide", "restart", "restore", "first step")


def run(quick: bool) -> Claim:
    """Interleave the arms on one market of machines; several kills each."""
    from orchestrator.simulate.market import SpotMarket

    kills, stock_kills = (3, 1) if quick else (7, 3)
    ours: list[dict[str, float]] = []
    stock: list[float] = []
    with tempfile.TemporaryDirectory() as folder, SpotMarket() as market:
        index = _photos(Path(folder))
        for name in ("a", "b"):
            market.add(name)
        for turn in range(kills):
            ours.append(_ours(market, index, Path(folder) / f"ours-{turn}"))
            market.add(f"b{turn}")
            if turn < stock_kills:
                stock.append(_stock(market, index, Path(folder) / f"stock-{turn}"))
                market.add(f"c{turn}")
    totals = [parts["total"] for parts in ours]
    arms = {"ours": summarize(totals), "stock Ray Train": summarize(stock)}
    for part in _PARTS:
        arms[f"ours: {part}"] = summarize([parts[part] for parts in ours])
    share = median(totals) / median(stock)
    return Claim(
        claim="SIGKILL of a machine to the next optimiser step",
        figure=median(totals),
        unit="s",
        goal=15.0,
        limit=None,
        arms=arms,
        notes=(f"{share:.1%} of stock Ray Train's median; asked: at most 25 %",),
    )


# --- the arms ---------------------------------------------------------------------------------------------


def _ours(market: Any, index: Path, work: Path) -> dict[str, float]:
    killed = _session("ours", market, index, work)
    account = json.loads((work / "goodput.json").read_text())
    (recovery,) = [entry for entry in account["recoveries"] if not entry["planned"]]
    marks = recovery["marks"]
    return {
        "detect": recovery["detected"] - killed,
        "decide": recovery["decided"] - recovery["detected"],
        "restart": marks["built"] - recovery["decided"],
        "restore": marks["restored"] - marks["built"],
        "first step": recovery["first_step"] - marks["restored"],
        "total": recovery["first_step"] - killed,
    }


def _stock(market: Any, index: Path, work: Path) -> float:
    killed = _session("stock", market, index, work)
    return next(entry["time"] for entry in _steps(work) if entry["time"] > killed + 0.5) - killed


def _session(arm: str, market: Any, index: Path, work: Path) -> float:
    """Train until steps are going well with two workers, kill a machine, wait for the next steps."""
    work.mkdir()
    command = [sys.executable, "-m", "bench.recover", arm, market.address, str(index), str(work)]
    with (work / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(lambda: _going(work, 2), driver, work)
            killed = float(market.kill(list(market.machines)[-1]))
            _wait(
                lambda: sum(e["time"] > killed + 0.5 and e["world"] == 1 for e in _steps(work)) >= 2,
                driver,
                work,
            )
            return killed
        finally:
            (work / "stop").touch()
            try:
                driver.wait(timeout=60)
            except subprocess.TimeoutExpired:
                driver.kill()
                driver.wait()


def _going(work: Path, world: int) -> bool:
    return sum(entry["world"] == world for entry in _steps(work)) >= _STEPS_BEFORE


def _steps(work: Path) -> list[dict[str, float]]:
    try:
        lines = (work / "steps.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _wait(condition: Callable[[], bool], driver: subprocess.Popen[bytes], work: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if driver.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the driver does not get on:\n{(work / 'log').read_text()[-3000:]}")
        time.sleep(0.05)


# --- what the drivers run ---------------------------------------------------------------------------------


def _photos(folder: Path) -> Path:
    from orchestrator.data.index import PhotoIndex, PhotoRow
    from orchestrator.data.samples import fetch_food
    from orchestrator.data.source import scan
    from orchestrator.spec import DataSource

    fetch_food(folder / "food")
    found = [p for p in scan(DataSource(path=folder / "food"), "food") if p.error is None]
    rows = [
        PhotoRow(p.source, p.path, str(folder / "food"), p.sha256, p.width, p.height, component="pool")
        for p in found
    ]
    PhotoIndex(rows).save(folder)
    return folder


def _job(index: Path, work: Path) -> Any:
    from orchestrator.elastic.job import Job
    from orchestrator.spec import Elastic
    from orchestrator.stages.pretrain import Pretrain
    from orchestrator.stages.selfsup import ModelRecipe
    from orchestrator.stages.tasks.crops import crop_blocks
    from orchestrator.stages.tasks.ssl import SelfSupervisedTask

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
        elastic=Elastic(workers=(1, 2), checkpoint_every_s=5.0),
    )


class _Note:
    """Writes down each step and its time, for both arms alike."""

    def __init__(self, work: Path) -> None:
        self._file = (work / "steps.jsonl").open("a")

    def __call__(self, step: int, world: int) -> None:
        self._file.write(json.dumps({"time": time.time(), "step": step, "world": world}) + "\n")
        self._file.flush()


def _drive_ours(address: str, index: Path, work: Path) -> None:
    from orchestrator.elastic import cluster, trainer
    from orchestrator.errors import Stopped
    from orchestrator.spec import Cluster
    from orchestrator.tracking.runs import NullRun

    note = _Note(work)

    class Noting(NullRun):
        def metrics(self, values: Mapping[str, float], step: int, channel: str = "train") -> bool:
            if channel == "train":
                note(step, self.world)
            elif channel == "goodput":
                self.world = int(values["workers"])
            return True

        world = 0

    stop = threading.Event()
    threading.Thread(target=_stop_by_file, args=(work, stop.set), daemon=True).start()
    with cluster.start(
        Cluster(address=address), preload=("orchestrator.stages.tasks.crops", "orchestrator.stages.tasks.ssl")
    ):
        try:
            trainer.run(_job(index, work), tracker=Noting(), stop=stop)
        except Stopped:
            return


def _drive_stock(address: str, index: Path, work: Path) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=address)
    trainer = TorchTrainer(
        _stock_worker,
        train_loop_config={"job": _job(index, work), "work": work},
        scaling_config=ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name="stock",
            storage_path=str(work),
            failure_config=FailureConfig(max_failures=10),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}},
        ),
    )
    threading.Thread(target=trainer.fit, daemon=True).start()
    done = threading.Event()
    _stop_by_file(work, done.set)
    ray.shutdown()


def _stock_worker(config: dict[str, Any]) -> None:
    import torch

    from orchestrator.elastic.loop import train
    from orchestrator.elastic.zero import import_deepspeed

    torch.set_num_threads(1)
    import_deepspeed().init_distributed("gloo", dist_init_required=False, verbose=False)
    train(config["job"], _StockLine(config["work"]))


class _StockLine:
    """Says nothing to anybody, but notes each step."""

    def __init__(self, work: Path) -> None:
        self._note = _Note(work)

    def phase(self, name: str) -> None: ...

    def report(self, step: int, figures: dict[str, float], stall_s: float) -> None:
        import torch.distributed as dist

        self._note(step, dist.get_world_size())

    def recorded(self, step: int) -> bool:
        return True

    def saved(self, step: int, figures: dict[str, float]) -> None: ...

    def trouble(self, what: str) -> None: ...

    def yield_requested(self) -> bool:
        return False


def _stop_by_file(work: Path, stop: Callable[[], None]) -> None:
    while not (work / "stop").exists():
        time.sleep(0.1)
    stop()


if __name__ == "__main__":
    drive = {"ours": _drive_ours, "stock": _drive_stock}[sys.argv[1]]
    drive(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
