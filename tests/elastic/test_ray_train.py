"""What a user of Ray Train finds: its runs in the state API, its results, its callbacks, its own worker group."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster, trainer
from orchestrator.elastic.controller_host import hosts
from orchestrator.errors import Stopped, UserError
from orchestrator.tracking.run import NullRun
from tools.market import SpotMarket

sys.path.insert(0, str(Path(__file__).parent))
from running import PATIENCE_S, Running, assert_same
from tiny import tiny_job


@pytest.fixture(scope="module")
def market() -> Iterator[SpotMarket]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with SpotMarket() as market:
            market.add("m0")
            market.add("m1")
            with cluster.start(Cluster(address=market.address)):
                yield market


@pytest.fixture(autouse=True)
def machines(market: SpotMarket) -> Iterator[SpotMarket]:
    yield market
    while Running.all:
        running = Running.all.pop()
        running.stop.set()
        running.thread.join(PATIENCE_S)
    for name in market.leaving & market.machines.keys():
        with suppress(psutil.NoSuchProcess):  # Ray has ended it
            market.kill(name)
    while len(market.machines) < 2:
        market.add(f"again-{time.monotonic_ns()}")


@pytest.fixture(scope="module")
def undisturbed(market: SpotMarket, tmp_path_factory: pytest.TempPathFactory) -> Running:
    running = Running(tiny_job(tmp_path_factory.mktemp("calm") / "calm", 60, (1, 2)))
    running.finish()
    return running


def train_runs(name: str) -> tuple[Any, list[Any]]:
    """Ray Train's record of a run and its attempts, from the actor behind its state API."""
    from ray.train.v2._internal.state.state_actor import get_state_actor

    actor = get_state_actor()
    runs = [run for run in ray.get(actor.get_train_runs.remote()).values() if run.name == name]
    attempts = ray.get(actor.get_train_run_attempts.remote())
    return runs[-1], list(attempts[runs[-1].id].values())


def test_the_state_api_lists_the_run_its_attempts_and_failed_ranks(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    job = tiny_job(tmp_path / "listed", 60, (1, 2), step_s=0.1, checkpoint_every_s=0.5)
    hold = tmp_path / "listed-faults" / "hold-30"
    hold.touch()
    running = Running(job)
    running.wait(lambda: running.step() >= 10)
    run, attempts = train_runs("listed")
    assert run.status.name == "RUNNING"
    assert run.run_settings.scaling_config.num_workers == (1, 2)
    assert len(attempts[-1].workers) == 2
    controller = ray._private.state.actors(run.controller_actor_id)
    assert (controller["State"], controller["ActorClassName"]) == ("ALIVE", "ControllerHost")
    assert len(machines.workers()) == 2
    for worker in machines.workers():
        listens = [one.laddr.ip for one in worker.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        assert set(listens) <= {"127.0.0.1"}, "all slots are on one machine: nothing is open to the network"
    machines.kill("m1")
    running.wait(lambda: any("goes on" in line for line in running.lines))
    hold.unlink()
    running.finish()
    run, attempts = train_runs("listed")
    assert run.status.name == "FINISHED"
    assert [attempt.status.name for attempt in attempts] == ["ERRORED", "FINISHED"]
    assert "Rank" in attempts[0].status_detail
    tags = running.run.tagged
    assert (tags["ray_train.status"], tags["ray_train.workers"]) == ("FINISHED", "1-2")
    ours = json.loads(tags["ray_train.attempts"])
    assert [attempt["status"] for attempt in ours] == ["ERRORED", "FINISHED"]
    assert ours[0]["failed_ranks"]
    assert_same(running, undisturbed)


def test_a_stopped_run_is_aborted_for_ray_train(machines: SpotMarket, tmp_path: Path) -> None:
    running = Running(tiny_job(tmp_path / "aborted", 60, (1, 2), step_s=0.1))
    running.wait(lambda: running.step() >= 5)
    running.stop.set()
    running.thread.join(PATIENCE_S)
    run, attempts = train_runs("aborted")
    assert (run.status.name, attempts[-1].status.name) == ("ABORTED", "ABORTED")


def test_checkpoints_reach_ray_train_as_pointers_and_callbacks_are_called(
    machines: SpotMarket, tmp_path: Path
) -> None:
    job = tiny_job(
        tmp_path / "seen", 60, (1, 2), step_s=0.05, checkpoint_every_s=0.3, ray_train_callbacks=("tiny:Seen",)
    )
    (tmp_path / "seen-faults" / "once-raise-30").touch()
    made = trainer.ElasticTrainer(job, hosts.current(), NullRun(), threading.Event(), lambda line: None)
    outcome = made.outcome()
    assert outcome["error"] is None
    with made.result.checkpoint.as_directory() as folder:
        pointer = json.loads((Path(folder) / "pointer.json").read_text())
    assert pointer == {"uri": job.final_checkpoint.as_uri(), "step": 60}
    assert made.result.metrics["step"] == 60
    records = [json.loads(line) for line in (job.work / "callback.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "step" in record]
    assert steps == sorted(steps)
    assert steps[-1] == 60
    assert any("failed" in record for record in records)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nowhere:Callback", "cannot be instantiated"),
        ("tiny:Nothing", "cannot be instantiated"),
        ("pathlib:Path", "is not a Ray"),
    ],
)
def test_a_callback_that_is_none_is_a_mistake_before_the_first_step(
    machines: SpotMarket, tmp_path: Path, path: str, what: str
) -> None:
    running = Running(tiny_job(tmp_path / "mistaken", 5, 1, ray_train_callbacks=(path,)))
    with pytest.raises(UserError, match=what):
        running.finish()


def test_a_wait_for_machines_has_a_limit(machines: SpotMarket, tmp_path: Path) -> None:
    running = Running(tiny_job(tmp_path / "waits", 5, 3, wait_for_workers_s=1.0))
    with pytest.raises(UserError, match="2 of at least 3 workers have a machine") as caught:
        running.finish()
    assert "elastic.wait_for_workers_s" in str(caught.value)


def test_a_stop_while_machines_are_waited_for_comes_at_once(machines: SpotMarket, tmp_path: Path) -> None:
    running = Running(tiny_job(tmp_path / "waiting", 60, (2, 2), step_s=0.1, checkpoint_every_s=0.5))
    running.wait(lambda: running.step() >= 5)
    machines.kill(list(machines.machines)[-1])
    running.wait(lambda: any("1 of at least 2 workers" in line for line in running.lines))
    _, attempts = train_runs("waiting")
    assert attempts[-1].status.name == "ERRORED", "not RUNNING while there is no group"
    running.stop.set()
    running.thread.join(30)
    assert not running.thread.is_alive()
    assert isinstance(running.error, Stopped)


def test_a_callback_that_raises_ends_the_run_with_it(machines: SpotMarket, tmp_path: Path) -> None:
    running = Running(tiny_job(tmp_path / "bad", 20, 1, ray_train_callbacks=("tiny:Broken",)))
    with pytest.raises(RuntimeError, match="no use"):
        running.finish()


@pytest.mark.long
def test_stock_workers_train_the_same_through_a_kill(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    job = tiny_job(tmp_path / "plain", 60, (1, 2), step_s=0.1, checkpoint_every_s=0.5, workers_from="stock")
    running = Running(job)
    running.wait(lambda: running.step() >= 10)
    machines.kill(next(iter(machines.machines)))
    account = running.finish()
    (killed,) = account.recoveries
    assert not killed.planned
    _, attempts = train_runs("plain")
    assert [attempt.status.name for attempt in attempts] == ["ERRORED", "FINISHED"]
    assert_same(running, undisturbed)


@pytest.mark.slow
def test_stock_workers_train_the_same_through_a_drain_and_a_kill(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    job = tiny_job(tmp_path / "stock", 60, (1, 2), step_s=0.2, checkpoint_every_s=0.5, workers_from="stock")
    running = Running(job)
    running.wait(lambda: running.step() >= 10)
    kept, leaving = list(machines.machines)
    machines.drain(leaving, 60)
    running.wait(lambda: any("goes on" in line for line in running.lines))
    machines.add("later")
    machines.kill(kept)
    account = running.finish()
    drained, killed = account.recoveries
    assert (drained.planned, killed.planned) == (True, False)
    assert account.counts["preemptions"] == 1
    _, attempts = train_runs("stock")
    assert [attempt.status.name for attempt in attempts] == ["FINISHED", "ERRORED", "FINISHED"]
    assert_same(running, undisturbed)


@pytest.mark.long
def test_a_slow_slot_is_left_out_not_given_up(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    Running(tiny_job(tmp_path / "both", 1, 2)).finish()  # now both slots are warm
    job = tiny_job(tmp_path / "slow", 60, (1, 2), step_s=0.15, checkpoint_every_s=0.3)
    running = Running(job)
    running.wait(lambda: running.step() >= 8)
    slow, other = (slot for slot in hosts.slots() if slot["job"] == job.name)
    process = psutil.Process(slow["pid"])
    worker = next(w for w in machines.workers() if other["pid"] in [above.pid for above in w.parents()])
    process.send_signal(signal.SIGSTOP)
    try:
        worker.kill()
        running.wait(lambda: any("goes on" in line for line in running.lines))
        states = {slot["name"]: slot for slot in hosts.slots()}
        assert states[slow["name"]]["unresponsive"]
    finally:
        process.send_signal(signal.SIGCONT)
    running.wait(lambda: not any(slot["unresponsive"] for slot in hosts.slots()))
    assert {slot["pid"] for slot in hosts.slots()} == {slow["pid"], other["pid"]}, "the same two slots"
    running.finish()
    assert_same(running, undisturbed)


@pytest.mark.long
def test_a_killed_controller_is_replaced(machines: SpotMarket, undisturbed: Running, tmp_path: Path) -> None:
    running = Running(tiny_job(tmp_path / "headless", 60, (1, 2), step_s=0.1, checkpoint_every_s=0.5))
    running.wait(lambda: running.step() >= 15)
    os.kill(ray.get(hosts.current().pid.remote()), signal.SIGKILL)
    running.finish()
    assert any("its controller is gone" in line for line in running.lines)
    assert_same(running, undisturbed)
