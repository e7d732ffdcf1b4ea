"""Kill a machine, count the seconds to the next optimizer step: Ray Train on warm workers beside stock Ray Train.

All arms train the same task with the same loop and the same checkpoints on two machines of one market; a machine is
killed (SIGKILL: raylet, workers and all) in the middle of a step. They take turns, each on fresh machines:

- `warm`: our runs, as a pipeline starts them;
- `stock group`: the same with `elastic: {workers_from: stock}`, Ray Train's own worker group under our policies;
- `untouched`: `TorchTrainer` with `num_workers=(1, 2)` and default settings;
- `baseline`: the warm arm of another checkout, if the environment variable BENCH_BASELINE has its folder.

Of `warm` and `baseline` it is also measured what growth, a notice of 30 s and a following stage cost, and how much
memory all processes take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from bench._recover import drive
from bench.harness import Arm, Claim, shown, summarize

_ROOT = Path(__file__).parents[1]
_STEPS_BEFORE, _STEPS_AFTER = 8, 3
_NOTICE_S = 30.0
_PATIENCE_S = 240.0
# Ray takes a killed node for alive for a few seconds.
_GONE_S = 20.0
_PARTS = ("detect", "decide", "restart", "restore", "first step")
_ASKED = "asked: growth at most 3 s, drain at most 2 s, next stage at most 3 s, memory at most 8 GiB"


@dataclass(frozen=True)
class Change:
    """One change of the workers, as the arm's own account or its steps tell it.

    Attributes:
        seconds: from the kill to the first step after it; of growth and drain from the last step before to the first
            step after.
        lost: steps that had to be done again.
        parts: of `seconds` after a kill; empty where the arm does not account for them.
    """

    seconds: float
    lost: int
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Measured:
    """All that was measured of one arm; `stages` are seconds from the end of a stage to the next one's first step."""

    kills: list[Change] = field(default_factory=list)
    growths: list[Change] = field(default_factory=list)
    drains: list[Change] = field(default_factory=list)
    stages: list[float] = field(default_factory=list)
    memory_gib: list[float] = field(default_factory=list)


def run(quick: bool) -> Claim:
    """Interleave the arms on one market of machines; several kills each."""
    from tools.market import SpotMarket

    checkouts = {"warm": _ROOT, "stock group": _ROOT, "untouched": _ROOT}
    if os.environ.get("BENCH_BASELINE"):
        checkouts["baseline"] = Path(os.environ["BENCH_BASELINE"]).absolute()
    measured = {name: Measured() for name in checkouts}
    with tempfile.TemporaryDirectory() as folder, SpotMarket() as market:
        index = _photographs(Path(folder))
        for number, (arm, what) in enumerate(plan(quick, "baseline" in checkouts)):
            work = Path(folder) / f"{number}"
            work.mkdir()
            sys.stderr.write(f"  {arm}: {what}\n")
            session = _Session(market, arm, checkouts[arm], index, work)
            with session.machines(), _Memory() as memory:
                if what == "stages":
                    measured[arm].stages += session.stages()
                else:
                    session.kill(measured[arm])
            measured[arm].memory_gib.append(memory.peak_gib)
    return claim(measured, _commit(checkouts["baseline"]) if "baseline" in checkouts else None)


def plan(quick: bool, baseline: bool) -> list[tuple[str, str]]:
    """Which arm does what, in order: turns with a kill of each arm, rotated by one each turn, and stages in between."""
    kills = {"warm": 2, "baseline": 2, "stock group": 1, "untouched": 1}
    stages_at: tuple[int, ...] = (0,)
    if not quick:
        kills = {"warm": 7, "baseline": 7, "stock group": 3, "untouched": 3}
        stages_at = (1, 4)
    if not baseline:
        del kills["baseline"]
    sessions = []
    for turn in range(max(kills.values())):
        arms = [arm for arm, times in kills.items() if turn < times]
        start = turn % len(arms)
        sessions += [(arm, "kill") for arm in arms[start:] + arms[:start]]
        if turn in stages_at:
            sessions += [(arm, "stages") for arm in ("warm", "baseline") if arm in kills]
    return sessions


def claim(measured: Mapping[str, Measured], baseline: str | None) -> Claim:
    """The claim from all that was measured.

    Args:
        measured: of each arm by name.
        baseline: the commit of the arm `baseline`, if there is one.
    """
    totals = {name: [change.seconds for change in found.kills] for name, found in measured.items()}
    arms: dict[str, Arm] = {name: summarize(seconds) for name, seconds in totals.items()}
    for name, found in measured.items():
        arms |= _details(name, found)
    ours = median(totals["warm"])
    notes = [
        f"{ours / median(totals['untouched']):.1%} of untouched TorchTrainer's median; asked: at most 5 %",
        *(f"{name}: {_lost(found)}" for name, found in measured.items()),
        f"{_ASKED}; memory is in GiB: the sum of PSS of the market and the driver at its peak",
        "warm and stock group: a step counts when the driver hears of it, up to 0.3 s after its end",
    ]
    if baseline is not None:
        ratio = ours / median(totals["baseline"])
        notes.insert(1, f"{shown(ratio)} times the baseline ({baseline}); asked: at most 1.5 times")
    return Claim(
        claim="SIGKILL of a machine to the next optimizer step",
        figure=ours,
        unit="s",
        goal=3.0,
        limit=None,
        arms=arms,
        notes=notes,
    )


def _details(name: str, found: Measured) -> dict[str, Arm]:
    rows: dict[str, Sequence[float]] = {}
    for part in _PARTS:
        rows[f"{name}: {part}"] = [change.parts[part] for change in found.kills if part in change.parts]
    rows[f"{name}: growth, pause"] = [change.seconds for change in found.growths]
    rows[f"{name}: drain, pause"] = [change.seconds for change in found.drains]
    rows[f"{name}: end of a stage to the next one's first step"] = found.stages
    rows[f"{name}: peak memory, GiB"] = found.memory_gib
    return {row: summarize(values) for row, values in rows.items() if values}


def _lost(found: Measured) -> str:
    changes = {"a kill": found.kills, "growth": found.growths, "a drain": found.drains}
    lost = {what: [change.lost for change in done] for what, done in changes.items() if done}
    texts = [f"{shown(median(steps))} (worst {max(steps)}) at {what}" for what, steps in lost.items()]
    return f"steps lost, median: {', '.join(texts)}"


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or checkout.name


# --- one driver of one arm ----------------------------------------------------------------------------------------


class _Session:
    """One driver of an arm, on two fresh machines.

    Args:
        market: of the machines.
        arm: name of the arm.
        checkout: whose code the driver and the machines run.
        index: folder with the index of photographs.
        work: the driver's folder.
    """

    def __init__(self, market: Any, arm: str, checkout: Path, index: Path, work: Path) -> None:
        self._market, self._arm, self._checkout = market, arm, checkout
        self._index, self._work = index, work

    @contextmanager
    def machines(self) -> Iterator[None]:
        """Two machines that run the arm's checkout; none is left afterwards."""
        try:
            for name in ("first", "second"):
                self._add(name)
            yield
        finally:
            for name in list(self._market.machines):
                self._market.kill(name)
            _wait_until_gone(self._market)

    def kill(self, into: Measured) -> None:
        """Kill a machine; then, of arms that resize without a loss, add one and drain one."""
        resizes = self._arm in ("warm", "baseline")
        with self._driver() as going:
            going(2, _STEPS_BEFORE, 0.0)
            # Now the machine of worker 0 dies, now the other one.
            victim = sorted(self._market.machines)[len(into.kills) % 2]
            killed = float(self._market.kill(victim))
            going(1, _STEPS_AFTER, killed)
            added = time.time()
            if resizes:
                self._add("third")
                going(2, _STEPS_BEFORE, added)
            noticed = time.time()
            if resizes:
                self._market.drain("third", _NOTICE_S)
                going(1, _STEPS_AFTER, noticed)
        steps = read_lines(self._work / "steps.jsonl")
        if self._arm == "untouched":
            into.kills.append(from_steps(steps, killed))
            return
        recoveries = json.loads((self._work / "goodput.json").read_text())["recoveries"]
        into.kills.append(from_account(recoveries, steps, killed, planned=False))
        if resizes:
            into.growths.append(from_account(recoveries, steps, added, planned=True))
            into.drains.append(from_account(recoveries, steps, noticed, planned=True))

    def stages(self) -> list[float]:
        """Seconds from the end of each stage to the first step of the next one, in one driver."""
        # An earlier checkout's own names are in its own driver, if it has one.
        own = self._checkout / "bench" / "_recover.py"
        driver_file = own if own.is_file() else _ROOT / "bench" / "_recover.py"
        command = [sys.executable, "-P", str(driver_file), "stages"]
        with (self._work / "log").open("w") as log:
            driver = self._start(command, log)
            try:
                driver.wait(_PATIENCE_S)
            finally:
                _end(driver, 0.0)
        if driver.returncode:
            raise RuntimeError(f"the driver failed:\n{self._log()}")
        times = [entry["time"] for entry in read_lines(self._work / "steps.jsonl")]
        ends = [entry["time"] for entry in read_lines(self._work / "ends.jsonl")]
        return [min(at for at in times if at > end) - end for end in ends[:-1]]

    def _add(self, name: str) -> None:
        # What a machine's processes import follows from its raylet's folder and environment, whatever driver they
        # work for.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(self._checkout)
        try:
            with chdir(self._checkout):
                self._market.add(name)
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before

    @contextmanager
    def _driver(self) -> Iterator[Callable[[int, int, float], None]]:
        """A driver that trains; what is yielded waits for so many steps with so many workers since a time."""
        arm = {"warm": "ours", "baseline": "ours", "stock group": "stock"}.get(self._arm, self._arm)
        with (self._work / "log").open("w") as log:
            driver = self._start([sys.executable, "-m", "bench.recover", arm], log)

            def going(world: int, steps: int, since: float) -> None:
                deadline = time.monotonic() + _PATIENCE_S
                while not _has_steps(self._work, world, steps, since):
                    if driver.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"{self._arm} does not get on:\n{self._log()}")
                    time.sleep(0.05)

            try:
                yield going
            finally:
                (self._work / "stop").touch()
                _end(driver, 60.0)

    def _start(self, command: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, self._market.address, str(self._index), str(self._work)],
            stdout=log,
            stderr=log,
            cwd=self._checkout,
            env={**os.environ, "PYTHONPATH": str(self._checkout)},
        )

    def _log(self) -> str:
        return (self._work / "log").read_text()[-3000:]


def _end(driver: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        driver.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()


def _has_steps(work: Path, world: int, number: int, since: float) -> bool:
    steps = read_lines(work / "steps.jsonl")
    return sum(entry["world"] == world and entry["time"] > since for entry in steps) >= number


def _wait_until_gone(market: Any) -> None:
    """Wait until Ray knows that no machine is there, so that the next driver places nothing on a dead one."""
    deadline = time.monotonic() + _GONE_S
    while time.monotonic() < deadline:
        alive = [node for node in market._cluster.global_state.node_table() if node["Alive"]]
        if len(alive) <= 1:
            return
        time.sleep(0.2)


class _Memory:
    """The memory of all processes below this one, looked at twice a second.

    Attributes:
        peak_gib: the largest sum of PSS seen so far.
    """

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.5):
            total = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak_gib = max(self.peak_gib, total / 2**30)


# --- what its files say -------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, float]]:
    """The entries of a file of JSON lines; none if it is not there yet, and not the one that is being written."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def from_account(
    recoveries: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, float]],
    since: float,
    *,
    planned: bool,
) -> Change:
    """The first change that a job accounts for after `since`.

    Args:
        recoveries: of the job's account.
        steps: that its driver noted.
        since: when the machine was killed, added or announced to go, in seconds since 1970.
        planned: whether the change left time for a checkpoint.

    Raises:
        RuntimeError: there is none.
    """
    found = [one for one in recoveries if one["planned"] is planned and one["detected"] > since]
    if not found:
        raise RuntimeError(f"the account has no {'planned' if planned else 'sudden'} change: {recoveries}")
    one = found[0]
    # Steps of the old group were noted before it ended, those of the new one long after.
    between = (one["detected"] + one["first_step"]) / 2
    last = max((int(entry["step"]) for entry in steps if entry["time"] < between), default=0)
    lost = max(0, last - int(one["resumed_at"]))
    if planned:
        return Change(one["first_step"] - one["last_step"], lost)
    marks = one["marks"]
    parts = {
        "detect": one["detected"] - since,
        "decide": one["decided"] - one["detected"],
        "restart": marks["built"] - one["decided"],
        "restore": marks["restored"] - marks["built"],
        "first step": one["first_step"] - marks["restored"],
    }
    return Change(one["first_step"] - since, lost, parts)


def from_steps(steps: Sequence[Mapping[str, float]], killed: float) -> Change:
    """What a kill cost an arm that keeps no account."""
    # A step that was almost done when the machine died is noted a moment later.
    before = [entry for entry in steps if entry["time"] <= killed + 0.5]
    after = next(entry for entry in steps if entry["time"] > killed + 0.5)
    lost = max(entry["step"] for entry in before) - after["step"] + 1
    return Change(after["time"] - killed, max(0, int(lost)))


def _photographs(folder: Path) -> Path:
    from orchestrator.config.schema import DataSource
    from orchestrator.data.index import ImageIndex, ImageRecord
    from orchestrator.data.samples import fetch_food
    from orchestrator.data.sources.scan import scan

    fetch_food(folder / "food")
    found = [p for p in scan(DataSource(path=folder / "food"), "food") if p.error is None]
    rows = [ImageRecord(p.source, p.path, str(folder / "food"), p.sha256, p.width, p.height) for p in found]
    ImageIndex(rows).save(folder)
    return folder


if __name__ == "__main__":
    drive(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
