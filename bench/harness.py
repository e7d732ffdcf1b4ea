"""How a claim is measured: interleaved arms, medians and ranges, CPU beside wall time, a calibration in the same run.

A bench module has a docstring whose first line is the claim, and `run(quick: bool) -> Claim`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Arm:
    """What one arm measured: median and range of `n` repetitions, in the claim's unit.

    `cpu_s` is the median processor time of a repetition in seconds, children included; None if not measured.
    """

    median: float
    low: float
    high: float
    n: int
    cpu_s: float | None = None


@dataclass(frozen=True)
class Claim:
    """One measured claim.

    Attributes:
        claim: one line: what is claimed.
        figure: what was measured, in `unit`.
        unit: of the figure, the goal and the limit, and of the arms unless a note says otherwise.
        goal: what we set out to reach, if any.
        limit: the physical or arithmetic bound of the figure, if there is one.
        arms: what was measured beside each other.
        notes: what a reader must know to trust or repeat it.
        calibration: what the machine could do in this run, from `calibrate`; `python -m bench` fills it in.
        better: whether less or more of the figure is better.
    """

    claim: str
    figure: float
    unit: str
    goal: float | None
    limit: float | None
    arms: Mapping[str, Arm]
    notes: Sequence[str] = ()
    calibration: Mapping[str, float] = field(default_factory=dict)
    better: Literal["less", "more"] = "less"

    @property
    def met(self) -> bool | None:
        """Whether the figure reaches the goal; None without a goal."""
        if self.goal is None:
            return None
        return self.figure <= self.goal if self.better == "less" else self.figure >= self.goal


class UnfairError(RuntimeError):
    """The arms did not do the same work, so their times say nothing."""


def summarize(values: Sequence[float], cpu_s: Sequence[float] = ()) -> Arm:
    """Median and range of one arm's repetitions. Raises ValueError without any."""
    if not values:
        raise ValueError("an arm without a repetition")
    cpu = statistics.median(cpu_s) if cpu_s else None
    return Arm(statistics.median(values), min(values), max(values), len(values), cpu)


def interleave(arms: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, Arm]:
    """Run every arm `repetitions` times, round by round, so that a slow minute hits all arms alike.

    The order is rotated by one each round: an arm that always came first, or always after the same other one,
    would keep that place's caches and clock rate for itself.

    Args:
        arms: each does its work once and returns what it measured, usually from `timed`.
        repetitions: rounds; at least one.
    """
    names = list(arms)
    values: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repetitions):
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            before = cpu_seconds()
            values[name].append(arms[name]())
            cpu[name].append(max(0.0, cpu_seconds() - before))
    return {name: summarize(values[name], cpu[name]) for name in names}


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """`with stopwatch() as seconds: …; seconds()` is the wall time since the start, fixed once the block ends."""
    start, end = time.perf_counter(), math.nan
    yield lambda: (time.perf_counter() if math.isnan(end) else end) - start
    end = time.perf_counter()


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """An arm that measures the wall time of `work` in seconds."""

    def arm() -> float:
        with stopwatch() as seconds:
            work()
        return seconds()

    return arm


def cpu_seconds() -> float:
    """Processor time of this process and all its descendants so far, those that ended and were waited for too.

    A process whose parent was killed belongs to nobody and takes its time with it.
    """
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += times.user + times.system
        total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


def calibrate(repetitions: int = 5) -> dict[str, float]:
    """What this machine can do just now, with torch's present number of threads.

    Returns:
        gemm_gflops: 10⁹ float operations a second of a float32 product of two 1024 × 1024 matrices (best).
        copy_gibs: GiB a second of a 128 MiB copy in memory, counted once (best).
        threads: torch's threads.
        cores: processors this process may use.
    """
    import torch

    size = 1024
    left, right = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    product = torch.empty(size, size)
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    # The fastest one: everything that disturbs a fixed piece of work makes it slower.
    gemm = min(_seconds(lambda: torch.mm(left, right, out=product)) for _ in range(repetitions + 1))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(repetitions + 1))
    return {
        "gemm_gflops": 2e-9 * size**3 / gemm,
        "copy_gibs": source.nbytes / 2**30 / copy,
        "threads": float(torch.get_num_threads()),
        "cores": float(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ),
    }


def require_same_losses(losses: Mapping[str, Sequence[float]], tolerance: float = LOSS_TOLERANCE) -> None:
    """Raises UnfairError unless all arms' losses agree step by step within `tolerance`, relative."""
    (first, reference), *others = losses.items()
    for name, values in others:
        if len(values) != len(reference):
            raise UnfairError(f"{name} took {len(values)} steps and {first} {len(reference)}")
        for step, (ours, theirs) in enumerate(zip(values, reference, strict=True)):
            if not abs(ours - theirs) <= tolerance * max(abs(theirs), 1e-12):
                raise UnfairError(
                    f"at step {step} the loss of {name} is {ours:.8g}, that of {first} {theirs:.8g}"
                )


def print_claim(console: Console, name: str, claim: Claim) -> None:
    """The claim as a table, for people."""
    console.print(f"[bold]{name}[/]: {claim.claim}", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("arm")
    for column in ("median", "low", "high", "n", "CPU s"):
        table.add_column(column, justify="right")
    for arm_name, arm in claim.arms.items():
        cpu = "" if arm.cpu_s is None else shown(arm.cpu_s)
        table.add_row(arm_name, shown(arm.median), shown(arm.low), shown(arm.high), str(arm.n), cpu)
    console.print(table)
    verdict = {True: "  [green]✓ met[/]", False: "  [red]✗ not met[/]", None: ""}[claim.met]
    bound = "" if claim.limit is None else f"  limit {shown(claim.limit)}"
    goal = (
        "" if claim.goal is None else f"  goal {'≤' if claim.better == 'less' else '≥'} {shown(claim.goal)}"
    )
    console.print(f"[bold]{shown(claim.figure)} {claim.unit}[/]{goal}{bound}{verdict}", highlight=False)
    calibration = "  ".join(f"{key} {shown(value)}" for key, value in claim.calibration.items())
    for line in (*claim.notes, *([f"calibration: {calibration}"] if calibration else [])):
        console.print(f"  {line}", style="bright_black", highlight=False, markup=False, soft_wrap=True)


def as_json(claim: Claim, **more: object) -> str:
    """The claim as one line of JSON, for machines; a figure that is not finite becomes null."""
    return json.dumps(_finite(asdict(claim) | {"met": claim.met} | more), allow_nan=False, ensure_ascii=False)


def shown(value: float) -> str:
    """A figure with as many digits as mean something."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _seconds(work: Callable[[], object]) -> float:
    return timed(work)()


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
