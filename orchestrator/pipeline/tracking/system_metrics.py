"""What the driver's machine is busy with while a stage runs, and the stage's curves on the pipeline's own run."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import threading
from collections.abc import Iterator

import psutil

from orchestrator.tracking.run import Run

EVERY_S = 10.0
# More points than a chart has pixels help nobody.
_MOST_POINTS = 1000
_log = logging.getLogger(__name__)


def machine_metrics() -> dict[str, float]:
    """CPU, memory and GPUs of this machine, by the names that MLflow's system metrics have."""
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
    }
    return found | _gpus()


def _gpus() -> dict[str, float]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    fields = "index,utilization.gpu,memory.used,memory.total,power.draw"
    try:
        text = subprocess.run(
            [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=EVERY_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_gpus(text)


def parse_gpus(text: str) -> dict[str, float]:
    """Figures from nvidia-smi's lines; what a card does not tell, such as `[N/A]`, is left out."""
    found: dict[str, float] = {}
    for line in text.strip().splitlines():
        index, *values = (value.strip() for value in line.split(","))
        numbers = [_number(value) for value in values]
        if len(numbers) != 4:
            continue
        busy, used, total, watts = numbers
        found |= {
            f"gpu_{index}_{name}": value
            for name, value in (
                ("utilization_percentage", busy),
                # nvidia-smi speaks of MiB.
                ("memory_usage_megabytes", None if used is None else used * 2**20 / 1e6),
                ("memory_usage_percentage", 100 * used / total if used is not None and total else None),
                ("power_usage_watts", watts),
            )
            if value is not None
        }
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class Follower:
    """Copies the losses of a stage, and of the runs below it, to the pipeline's run, as `<stage>/loss`.

    Args:
        root: the pipeline's run.
        stage: the stage's run.
        name: of the stage.
    """

    def __init__(self, root: Run, stage: Run, name: str) -> None:
        self._root = root
        self._stage = stage
        self._name = name
        self._read: dict[str, int] = {}
        self._losses: dict[str, dict[int, float]] = {}

    def newest(self) -> None:
        """Copy the newest loss of each run: a point each time, while the stage runs."""
        for channel in self._catch_up():
            step, loss = max(self._losses[channel].items())
            self._root.metrics({"loss": loss}, step, channel)

    def rest(self) -> None:
        """Copy what was left out, as evenly as a chart needs it; those that are there already stay."""
        self._catch_up()
        for channel, losses in self._losses.items():
            steps = sorted(losses)
            stride = -(-len(steps) // _MOST_POINTS)
            for step in dict.fromkeys([*steps[::stride], steps[-1]]):
                self._root.metrics({"loss": losses[step]}, step, channel)

    def _catch_up(self) -> list[str]:
        """Read what is new; returns the channels that have something new."""
        changed = []
        for channel, run in {self._name: self._stage, **self._stage.children()}.items():
            records, self._read[channel] = run.since(self._read.get(channel, 0))
            new = {
                int(record["step"]): float(record["metrics"]["loss"])
                for record in records
                if record["channel"] == "train" and "loss" in record["metrics"]
            }
            if new:
                self._losses[channel] = _thinned({**self._losses.get(channel, {}), **new})
                changed.append(channel)
        return changed


def _thinned(losses: dict[int, float]) -> dict[int, float]:
    """A long curve with every second point, so that a long run does not fill the memory; the newest stays."""
    while len(losses) > 4 * _MOST_POINTS:
        steps = sorted(losses)
        losses = {step: losses[step] for step in [*steps[:-1:2], steps[-1]]}
    return losses


@contextlib.contextmanager
def watched(root: Run, stage: Run, name: str, every_s: float = EVERY_S) -> Iterator[None]:
    """While the `with` block runs: figures of this machine on the stage's run, its losses on the pipeline's.

    Trouble with either is logged and never reaches the stage.
    """
    follower = Follower(root, stage, name)
    stop = threading.Event()
    first = 0
    with _untroubled(f"system metrics of stage {name} count from 0"):
        # A stage that goes on counts on: a step that is there already is refused.
        first = 1 + max((int(record["step"]) for record in stage.history("system")), default=-1)

    def watch() -> None:
        psutil.cpu_percent()  # measures since the last call: the first has nothing to measure from
        number = first
        while not stop.wait(every_s):
            stage.metrics(machine_metrics(), number, "system")
            number += 1
            follower.newest()

    def guarded() -> None:
        with _untroubled(f"system metrics of stage {name} end here"):
            watch()

    thread = threading.Thread(target=guarded, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(every_s)
        with _untroubled(f"the pipeline's run is missing losses of stage {name}"):
            if thread.is_alive():
                raise TimeoutError("the figures of this machine are still being read")
            follower.rest()


@contextlib.contextmanager
def _untroubled(consequence: str) -> Iterator[None]:
    """Trouble in the `with` block is logged with its consequence, and goes no further."""
    try:
        yield
    except Exception as error:  # whatever a driver of a GPU or a file system can throw
        _log.warning("%s: %s", consequence, error)
