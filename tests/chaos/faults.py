"""What a storm does. Each fault says what it did, or None if it is not possible now."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from chaos.scene import Trap
from chaos.sight import actors

if TYPE_CHECKING:
    from chaos.storm import Storm

FEWEST_MACHINES, MOST_MACHINES = 2, 4
_PATIENCE_S = 15.0
_SHARD = r"/checkpoints/step-\d+/a\d+/shard-"
_MANIFEST = r"/checkpoints/step-\d+/checkpoint\.json"
_DRIVERS = r"/(artifacts|ledger|spool|logs)/"
_STORE_TROUBLE = ("500", "503", "drop", "lost", "truncate", "slow", "timeout")

Fault = Callable[["Storm"], str | None]


def worker_killed(storm: Storm) -> str | None:
    """SIGKILL of one training process."""
    worker = storm.worker()
    if worker is None:
        return None
    worker.kill()
    return f"worker {worker.pid}"


def worker_stopped(storm: Storm) -> str | None:
    """SIGSTOP of one training process: it is alive and does nothing."""
    worker = storm.worker()
    if worker is None:
        return None
    worker.suspend()
    return f"worker {worker.pid}"


def machine_killed(storm: Storm) -> str | None:
    """SIGKILL of a raylet with all its processes."""
    if len(storm.staying()) <= FEWEST_MACHINES:
        return None
    name = storm.random.choice(storm.staying())
    storm.market.kill(name)
    return f"machine {name}"


def all_machines_killed(storm: Storm) -> str | None:
    """Every machine but the head goes at once; two come seconds later."""
    if not storm.worker():
        return None
    gone = list(storm.market.machines)
    for name in gone:
        storm.market.kill(name)
    storm.later(storm.random.uniform(1, 5), storm.add_machine)
    storm.later(6, storm.add_machine)
    storm.later(7, storm.add_machine)
    return f"machines {', '.join(gone)}"


def announced_and_killed_early(storm: Storm) -> str | None:
    """A machine says that it goes in 30 s, and goes after a few."""
    return _drain(storm, 30, storm.random.uniform(1, 6))


def announced_and_killed_late(storm: Storm) -> str | None:
    """A machine says that it goes in 6 s, and goes after that."""
    return _drain(storm, 6, storm.random.uniform(7, 12))


def _drain(storm: Storm, notice_s: float, after_s: float) -> str | None:
    if len(storm.staying()) <= FEWEST_MACHINES:
        return None
    name = storm.random.choice(storm.staying())
    storm.leaving.add(name)
    storm.market.drain(name, notice_s)

    def go() -> None:
        if name in storm.market.machines:
            storm.market.kill(name)

    storm.later(after_s, go)
    return f"machine {name}, {notice_s:.0f} s of notice, gone after {after_s:.0f} s"


def machine_added(storm: Storm) -> str | None:
    """A machine joins."""
    if len(storm.staying()) >= MOST_MACHINES:
        return None
    return f"machine {storm.add_machine()}"


def teacher_killed(storm: Storm) -> str | None:
    """SIGKILL of the process of the teacher's actor."""
    found = actors(storm.scene.processes(), "TeacherActor")
    if not found:
        return None
    for teacher in found:
        with contextlib.suppress(psutil.Error):
            teacher.kill()
    return f"process {found[0].pid}"


def controller_killed(storm: Storm) -> str | None:
    """SIGKILL of the actor that holds Ray Train's controllers and the worker pool."""
    found = actors(storm.scene.processes(), "ControllerHost")
    if not found:
        return None
    with contextlib.suppress(psutil.Error):
        found[0].kill()
    return f"process {found[0].pid}"


def driver_killed(storm: Storm) -> str | None:
    """SIGKILL of the driver."""
    return f"process {storm.driver.kill()}"


def killed_while_writing(storm: Storm) -> str | None:
    """SIGKILL of a worker that has half a checkpoint file on its disk."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and (workers := storm.market.workers()):
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            for worker in workers:
                if name := _writing(worker.pid):
                    os.kill(worker.pid, signal.SIGKILL)
                    return f"worker {worker.pid} at {name}"
            time.sleep(0.002)
    return None


def _writing(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(link.readlink())
                if "/checkpoints/step-" in name and name.endswith(".partial"):
                    return "/".join(name.split("/")[-3:])
    return None


def killed_while_uploading(storm: Storm) -> str | None:
    """SIGKILL of a worker whose shard is on its way to the store; it may arrive or not."""
    return _trap_worker(storm, _SHARD)


def killed_while_committing(storm: Storm) -> str | None:
    """SIGKILL of worker 0 whose manifest is on its way to the store; it may arrive or not."""
    return _trap_worker(storm, _MANIFEST)


def _trap_worker(storm: Storm, path: str) -> str | None:
    workers = {worker.pid for worker in storm.market.workers()}
    if not workers:
        return None
    reply = storm.random.choice(["drop", None])
    trap = Trap("PUT", path, lambda: workers, reply)
    storm.scene.proxy.trap = trap
    if not trap.happened.wait(_PATIENCE_S):
        storm.scene.proxy.trap = None
        if not trap.happened.is_set():
            return None
    return f"{_caught(trap)}, which {'was lost' if reply else 'arrived'}"


def driver_killed_while_writing(storm: Storm) -> str | None:
    """SIGKILL of the driver whose artifact, event, log or spool piece is on its way to the store."""
    reply = storm.random.choice(["drop", None])
    trap = Trap("PUT", _DRIVERS, lambda: {storm.driver.pid}, reply)
    storm.scene.proxy.trap = trap
    storm.driver.doomed = True
    if not trap.happened.wait(2 * _PATIENCE_S):
        storm.scene.proxy.trap = None
        if not trap.happened.is_set():
            storm.driver.doomed = False
            return None
    return f"{_caught(trap)}, which {'was lost' if reply else 'arrived'}"


def _caught(trap: Trap) -> str:
    assert trap.sprung is not None
    path, pid, _ = trap.sprung
    name = re.sub(r"^.*?/(work|artifacts|ledger|spool|logs)/", r"\1/", path.partition("?")[0])
    return f"process {pid} at {name}"


def store_in_trouble(storm: Storm) -> str | None:
    """For some seconds two of five requests meet errors, broken connections, slow and lost replies."""
    proxy, seconds = storm.scene.proxy, storm.random.uniform(4, 8)
    if proxy.rate:
        return None
    proxy.kinds, proxy.rate = _STORE_TROUBLE, 0.4
    storm.later(seconds, storm.calm_store)
    return f"40% of requests for {seconds:.0f} s"


def store_away(storm: Storm) -> str | None:
    """For some seconds the store answers nothing."""
    proxy, seconds = storm.scene.proxy, storm.random.uniform(3, 6)
    if proxy.rate:
        return None
    kind = storm.random.choice(["503", "drop", "timeout"])
    proxy.kinds, proxy.rate = (kind,), 1.0
    storm.later(seconds, storm.calm_store)
    return f"every request: {kind}, for {seconds:.0f} s"


def tracking_away(storm: Storm) -> str | None:
    """SIGKILL of the MLflow server, which is started again some seconds later."""
    if storm.tracking_is_away:
        return None
    seconds = storm.random.uniform(3, 12)
    storm.tracking_is_away = True
    storm.scene.tracking.kill()
    storm.later(seconds, storm.restart_tracking)
    return f"for {seconds:.0f} s and its start"


# How often a kind is drawn beyond the two of each that every long storm has.
KINDS: dict[Fault, int] = {
    worker_killed: 3,
    worker_stopped: 1,
    machine_killed: 4,
    all_machines_killed: 0,
    announced_and_killed_early: 2,
    announced_and_killed_late: 2,
    machine_added: 8,
    teacher_killed: 1,
    controller_killed: 1,
    driver_killed: 2,
    killed_while_writing: 1,
    killed_while_uploading: 1,
    killed_while_committing: 1,
    driver_killed_while_writing: 1,
    store_in_trouble: 2,
    store_away: 1,
    tracking_away: 1,
}
