"""From an undisturbed run to the last check."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chaos import checks, recipe
from chaos.faults import Fault
from chaos.runs import Run
from chaos.scene import Scene, scene
from chaos.storm import Storm
from chaos.summary import summary

_CALM_S = 1800.0
_REPLAYS = 5


def weather(
    folder: Path,
    pipeline: dict[str, Any],
    faults: Sequence[Fault],
    *,
    seed: int,
    machines: int,
    seconds: float,
    say: Callable[[str], None],
) -> tuple[str, list[str]]:
    """The undisturbed run, the storm, the checks.

    Args:
        folder: an empty one; what the storm leaves is there.
        pipeline: what to run.
        faults: in their order; those not possible yet come later.
        seed: of everything else that is left to chance.
        machines: there are when the storm begins.
        seconds: after which the storm is given up.
        say: gets a line for each fault.

    Returns:
        The summary in Markdown, and what is wrong.
    """
    memory = checks.shared_memory()
    with scene(folder, seed) as here:
        # On one machine: what comes out is the same on any number, and it takes fewest processes.
        here.market.add("m0")
        calm = Run(here, pipeline, "calm")
        began = time.monotonic()
        driver = calm.driver()
        driver.run(_CALM_S)
        assert not driver.own_ends, driver.tail()
        say(f"undisturbed: {time.monotonic() - began:.0f} s")
        for number in range(1, machines):
            here.market.add(f"m{number}")
        run = Run(here, pipeline, "storm")
        jobs = recipe.jobs(pipeline)
        steps = sum(pipeline["stages"][job.partition("/")[0]]["steps"] for job in jobs)
        storm = Storm(here, run, faults, seed=seed, steps=steps, say=say)
        storm.run(seconds)
        checked, wrong = _examine(here, calm, run, storm)
    left = [*checks.orphans(here.mark), *checks.leaked_memory(memory)]
    checked.append(f"processes and shared memory left behind: {len(left)}")
    head = f"Seed {seed}; {machines} machines at first; {len(jobs)} jobs, {steps} steps in all."
    return summary(storm, head, checked, [*wrong, *left]), [*wrong, *left]


def _examine(here: Scene, calm: Run, run: Run, storm: Storm) -> tuple[list[str], list[str]]:
    """What was looked at, and what is wrong."""
    here.tracking.wait()
    for _ in range(_REPLAYS):
        # What could not be sent in time, the next run sends; it finds nothing else to do.
        if _pending(run) == 0:
            break
        run.driver().run(300)
    before, after = checks.Objects(here, calm), checks.Objects(here, run)
    wrong = [f"a fault that never came: {fault.__name__}" for fault in storm.missing()]
    checked = []
    for job in recipe.jobs(run.pipeline):
        loss, found = checks.same_model(before, after, job)
        wrong += found
        if not found:
            checked.append(
                f"{job}: sample orders equal, losses within {loss:.1e}, all weights bit for bit equal"
            )
    counts, found = checks.ledger(after, run.pipeline, storm.driver.starts)
    wrong += found
    checked.append(f"ledger: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    counts, found = checks.tracking(here, run)
    wrong += found
    checked.append(f"MLflow: {counts['runs']} runs, all finished, every step once")
    wrong += [*checks.artifacts(after), *storm.wrong]
    # An epoch stays, so that no later holder gets the same number.
    left = [name for kind in ("work/", "holds/") for name in after.names(kind) if not name.endswith(".epoch")]
    wrong += [f"left in the store: {name}" for name in left]
    checked.append(f"artifacts: {len(after.names('artifacts/'))} files as their manifests say")
    checked.append(f"checkpoints seen on the way: {storm.checkpoints_seen}, all whole")
    checked.append(f"uploads never ended: {len(after.uploads())}")
    checked.append(f"most memory files of one process: {storm.sight.most_memory_files}")
    return checked, wrong


def _pending(run: Run) -> int:
    from orchestrator.tracking.flusher import Flusher
    from orchestrator.tracking.mlflow_writer import MlflowWriter
    from orchestrator.tracking.spool import Spool

    folder = run.sight.root / "spool" / run.pipeline["name"]
    return Flusher(Spool(folder), MlflowWriter("sqlite:///unused.db", "unused")).pending()


def keep(folder: Path, where: Path) -> None:
    """Keep the logs of a storm that went wrong."""
    shutil.copytree(
        folder, where, ignore=shutil.ignore_patterns("food", "jfs", "s3", "*.safetensors"), dirs_exist_ok=True
    )
