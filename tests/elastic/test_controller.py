"""The elastic job on a real cluster of several raylets: machines go, come back and announce their end.

Every story ends with the metrics and the weights of the undisturbed run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.elastic.controller_host import hosts
from orchestrator.elastic.time_accounting import TimeAccounting
from orchestrator.errors import Stopped, UserError
from tools.market import SpotMarket

sys.path.insert(0, str(Path(__file__).parent))
from running import PATIENCE_S, Running, assert_same
from tiny import tiny_job


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpotMarket]:
    """Two machines of one place each, on which a build of an extension was once killed; tests leave as many behind."""
    extensions = tmp_path_factory.mktemp("extensions")
    for op in ("deepspeed_shm_comm", "fused_adam", "cpu_adam"):
        # What a process leaves that was killed while it built the op: torch waits for its holder for ever.
        lock = extensions / f"py{sys.version_info.major}{sys.version_info.minor}_cpu" / op / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        with SpotMarket() as market:
            market.add("m0")
            market.add("m1")
            with cluster.start(Cluster(address=market.address)):
                yield market


@pytest.fixture
def machines(market: SpotMarket) -> Iterator[SpotMarket]:
    yield market
    for name in {*market.leaving, *list(market.machines)[2:]} & market.machines.keys():
        with suppress(psutil.NoSuchProcess):  # Ray has ended it
            market.kill(name)
    while len(market.machines) < 2:
        market.add(f"again-{time.monotonic_ns()}")


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """A job that a failing test left running would be taken for the next one's."""
    yield
    while Running.all:
        running = Running.all.pop()
        running.stop.set()
        running.thread.join(PATIENCE_S)


@pytest.fixture(scope="module")
def undisturbed(market: SpotMarket, tmp_path_factory: pytest.TempPathFactory) -> Running:
    running = Running(tiny_job(tmp_path_factory.mktemp("calm") / "calm", 60, (1, 3)))
    account = running.finish()
    assert account.counts.get("restarts", 0) == 0
    return running


def worker_pids(machines: SpotMarket) -> list[int]:
    return [process.pid for process in machines.workers()]


@pytest.mark.long
def test_machines_killed_drained_and_added(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    first, second = list(machines.machines)
    job = tiny_job(tmp_path / "storm", 60, (1, 3), step_s=0.3, checkpoint_every_s=0.5)
    hold = tmp_path / "storm-faults" / "hold-14"
    hold.touch()
    running = Running(job)
    running.wait(lambda: running.step() >= 6)
    machines.kill(second)
    running.wait(lambda: any("lost 1 of 2 workers" in line for line in running.lines))
    killed_at = running.step()
    running.wait(lambda: running.step() > killed_at)
    machines.add("third")
    machines.add("fourth")
    running.wait(lambda: sum(slot["state"] == "ready" for slot in hosts.slots()) == 3)
    hold.unlink()
    running.wait(lambda: any("growth" in line for line in running.lines))
    grown = [line for line in running.lines if "growth" in line]
    reached = running.step()
    running.wait(lambda: running.step() > reached + 2)
    machines.drain(first, 30)
    machines.drain("third", 30)
    running.wait(lambda: any("notice" in line for line in running.lines))
    machines.kill(first)  # before its deadline
    account = running.finish()
    assert account.counts["preemptions"] == 1, "what had announced itself was not missed"
    assert account.recoveries[-1].workers == 1
    assert account.counts["resizes"] >= 2, grown
    lost = account.counts["steps_lost"]
    assert all(
        entry.planned for entry in account.recoveries if "growth" in entry.cause or "notice" in entry.cause
    )
    (kill,) = (entry for entry in account.recoveries if not entry.planned)
    # A step may be reported after the loss is.
    assert lost <= killed_at + 1 - kill.resumed_at, (
        "only the kill lost steps, those since the last checkpoint"
    )
    assert_same(running, undisturbed)
    machines.kill("third")


def test_a_killed_worker_is_forked_again_on_its_warm_slot(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    running = Running(tiny_job(tmp_path / "worker", 60, (1, 3), step_s=0.15, checkpoint_every_s=0.3))
    slots = []
    for round_ in range(2):
        running.wait(lambda reached=10 * (round_ + 1): running.step() >= reached)  # type: ignore[misc]
        worker = machines.workers()[-round_]
        slots.append(worker.parent().parent())
        worker.kill()
        running.wait(lambda count=round_ + 1: sum("goes on" in line for line in running.lines) >= count)  # type: ignore[misc]
    running.finish()
    assert all(slot.is_running() and "ray::WorkerSlot" in slot.name() for slot in slots)
    assert_same(running, undisturbed)


@pytest.mark.long
def test_a_stopped_worker_is_found_named_and_replaced(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    running = Running(
        tiny_job(tmp_path / "stopped", 60, (1, 3), checkpoint_every_s=0.5, heartbeat_timeout_s=4)
    )
    running.wait(lambda: running.step() >= 5)
    os.kill(worker_pids(machines)[0], signal.SIGSTOP)
    running.wait(lambda: any("is stopped" in line for line in running.lines))
    running.finish()
    assert_same(running, undisturbed)


@pytest.mark.long
def test_a_step_that_never_ends_is_found_by_its_lack_of_progress(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    job = tiny_job(tmp_path / "hang", 60, (1, 3), checkpoint_every_s=0.5, stall_timeout_s=5)
    (tmp_path / "hang-faults" / "once-hang-12").touch()
    running = Running(job)
    running.finish()
    assert any("made no progress" in line for line in running.lines)
    assert_same(running, undisturbed)


def test_an_exception_in_the_task_ends_the_job_with_it_on_top(machines: SpotMarket, tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "failing", 60, (1, 3), checkpoint_every_s=0.5)
    (tmp_path / "failing-faults" / "raise-9").touch()
    (tmp_path / "failing-faults" / "once-raise-3").touch()
    running = Running(job)
    with pytest.raises(RuntimeError, match="failing failed: ValueError: no good at step 9"):
        running.finish()
    account = TimeAccounting.load(job.work / "goodput.json")
    assert account.counts.get("preemptions", 0) == 0
    assert account.counts["failures"] == 3, "one that passed, and the same one twice"


def test_a_users_mistake_is_not_tried_again(machines: SpotMarket, tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "mistaken", 60, (1, 3))
    (tmp_path / "mistaken-faults" / "mistake-2").touch()
    running = Running(job)
    with pytest.raises(UserError, match="the photos are gone"):
        running.finish()


def test_a_stop_checkpoints_and_goes_on_bit_for_bit(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    job = tiny_job(tmp_path / "user", 60, 2, step_s=0.1)
    running = Running(job)
    running.wait(lambda: running.step() >= 20)
    running.stop.set()
    with pytest.raises(Stopped):
        running.finish()
    again = Running(job)
    again.finish()
    records = {**{r["step"]: r for r in running.run.history()}, **{r["step"]: r for r in again.run.history()}}
    assert sorted(records) == list(range(1, 61))
    first = min(int(r["step"]) for r in again.run.history())
    assert first == running.step() + 1, "no step is done twice"
    whole = Running(tiny_job(tmp_path / "whole", 60, 2))
    whole.finish()
    for record in whole.run.history():
        assert records[record["step"]]["metrics"]["loss"] == record["metrics"]["loss"]
    ours, theirs = load_file(job.export(60)), load_file(whole.job.export(60))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long
def test_all_machines_go_and_one_comes_back(
    machines: SpotMarket, undisturbed: Running, tmp_path: Path
) -> None:
    running = Running(tiny_job(tmp_path / "none", 60, (1, 3), step_s=0.1, checkpoint_every_s=0.5))
    running.wait(lambda: running.step() >= 10)
    for name in list(machines.machines):
        machines.kill(name)
    running.wait(lambda: any("0 of at least 1 workers" in line for line in running.lines))
    machines.add("late")
    account = running.finish()
    assert account.waiting > 0
    assert_same(running, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.long
def test_a_full_disk_is_told_and_waited_out_for_a_while(
    machines: SpotMarket, undisturbed: Running, small_disk: Path
) -> None:
    running = Running(tiny_job(small_disk / "full", 60, (1, 3), step_s=0.2, checkpoint_every_s=1.5))
    running.wait(lambda: running.step() >= 8)
    ballast = small_disk / "ballast"
    fill(ballast)
    running.wait(lambda: any("MB free" in line for line in running.lines))
    ballast.unlink()
    running.finish()
    assert_same(running, undisturbed)


@pytest.mark.long
def test_a_disk_that_stays_full_ends_the_job_with_the_reason(machines: SpotMarket, small_disk: Path) -> None:
    running = Running(tiny_job(small_disk / "stuck", 400, (1, 3), checkpoint_every_s=1))
    running.wait(lambda: running.step() >= 8)
    fill(small_disk / "ballast")
    with pytest.raises(RuntimeError, match=r"stuck failed: CheckpointError: .*No space left on device"):
        running.finish()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))
