"""A step of a distillation takes what the planner predicts from a minute of measuring, whatever the teacher costs.

One pipeline with a stage for each ratio of teacher to students, run on this machine's cores: what was measured is
kept in a folder of the run's own. Costs are measured before the stages run and once more after it, as the speed of a
machine that others share drifts; the figure is the worst of all predictions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench._measure import from_mlflow
from bench.harness import Arm, Claim, cpu_seconds, summarize
from orchestrator.capacity.allocate import predicted
from orchestrator.pipeline.cost.device_split import StageSplit, splits
from orchestrator.pipeline.load import load

GOAL = 0.15
_POLL_S = 0.5
# Until the window is full and the first steps' late imports are over.
_FIRST_STEPS = 6
_HEADS = {"prototype_std": 0.125}
_CROPS = {"global_size": 64, "local_size": 32, "num_local": 4, "blur_sigma": [0.1, 0.6]}
# Teacher → its students: the teacher is a small part of a step, about half, and most of it.
_CASES: Mapping[str, tuple[str, tuple[str, str]]] = {
    "light": ("vit_pico", ("vit_nano", "convnext_mini")),
    "even": ("vit_micro", ("vit_nano", "vit_pico")),
    "heavy": ("vit_micro", ("vit_femto", "vit_femto")),
}


@dataclass(frozen=True)
class Stage:
    """How a stage went: seconds a step of its slowest student, and processor seconds of everything a step."""

    step_s: float
    cpu_s: float


def run(quick: bool) -> Claim:
    """Predict each stage's step time, then run the stages."""
    cases = {name: _CASES[name] for name in (("even",) if quick else tuple(_CASES))}
    folder = Path(tempfile.mkdtemp(prefix="orchestrator-balance-"))
    before = os.environ.get("ORCHESTRATOR_CACHE")
    try:
        _write(folder, cases, steps=24 if quick else 40)
        # The photographs are cached for all runs; what is measured must not be.
        os.environ["ORCHESTRATOR_CACHE"] = str(folder / "cache")
        loaded = load(folder / "pipeline.yaml", [f"store={folder / 'runs'}"], needs_data=False)
        found = [splits(loaded, _cores(), refresh=True, say=lambda line: None)]
        measured = _measured(folder, cases)
        found.append(splits(loaded, _cores(), refresh=True, say=lambda line: None))
    finally:
        os.environ.pop("ORCHESTRATOR_CACHE")
        if before is not None:
            os.environ["ORCHESTRATOR_CACHE"] = before
        shutil.rmtree(folder, ignore_errors=True)
    return _claim(found, measured)


def _write(folder: Path, cases: Mapping[str, tuple[str, tuple[str, str]]], steps: int) -> None:
    from orchestrator.data.samples import fetch_food

    fetch_food(folder / "food")
    sizes: dict[str, Any] = {"batch_size": 32, "block_size": 16, "crops": _CROPS}
    optimizer = {"lr": {"peak": 1e-3}}
    stages: dict[str, Any] = {"curate": {"kind": "curate", "data": "photos", "clusters": 4}}
    for model in dict.fromkeys(teacher for teacher, _ in cases.values()):
        stages[f"teacher_{model}"] = {
            "kind": "pretrain", "needs": "curate", "model": model, "heads": _HEADS, "steps": 1,
            "optimizer": optimizer, **sizes,
        }  # fmt: skip
    for name, (teacher, students) in cases.items():
        stages[name] = {
            "kind": "distill", "needs": ["curate", f"teacher_{teacher}"], "steps": steps, "optimizer": optimizer,
            "elastic": {"workers": 1, "checkpoint_every_s": 3600},
            "students": {f"s{number}": {"model": model} for number, model in enumerate(students)}, **sizes,
        }  # fmt: skip
    pipeline = {
        "name": "balance",
        "store": str(folder / "runs"),
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        "data": {"photos": {"path": str(folder / "food")}},
        "stages": stages,
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))


def _measured(folder: Path, cases: Mapping[str, tuple[str, tuple[str, str]]]) -> dict[str, Stage]:
    """How the stages went, as long as all students of each were training."""
    command = [sys.executable, "-m", "orchestrator", "run", str(folder / "pipeline.yaml")]
    clock: list[tuple[float, float]] = []
    with (folder / "run.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                clock.append((time.time(), cpu_seconds()))
                time.sleep(_POLL_S)
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"the run failed:\n{(folder / 'run.log').read_text()[-3000:]}")
    tracking = f"sqlite:///{folder / 'mlflow.db'}"
    found = {}
    for name, (_, students) in cases.items():
        series = [from_mlflow(tracking, f"{name}/s{number}").steps for number in range(len(students))]
        began = max(times[_FIRST_STEPS][0] for times in series)
        ended = min(times[-1][0] for times in series)
        rates = []
        for times in series:
            inside = [(at, step) for at, step in times if began <= at <= ended]
            (first, first_step), (last, last_step) = inside[0], inside[-1]
            rates.append((last - first) / (last_step - first_step))
        # One that is quicker fills its window first, and then goes at the pace of the slowest.
        step_s = max(rates)
        # Only while all of them were there: a process that ends may take its time with it.
        looks = [look for look in clock if began <= look[0] <= ended]
        wall_s, used_s = (last - first for first, last in zip(looks[0], looks[-1], strict=True))
        found[name] = Stage(step_s, used_s / wall_s * step_s)
    return found


def _claim(found: Sequence[Sequence[StageSplit]], measured: Mapping[str, Stage]) -> Claim:
    """From what was measured of the parts, as often as that was done, and of the stages."""
    arms: dict[str, Arm] = {}
    notes, errors = [], []
    for items in zip(*found, strict=True):
        name = items[0].name
        said = summarize([_step_s(item) for item in items])
        real_s, cpu_s = measured[name].step_s, measured[name].cpu_s
        arms[f"{name}: s a step predicted"] = said
        arms[f"{name}: s a step measured"] = summarize([real_s])
        errors.append(max(abs(said_s - real_s) / real_s for said_s in (said.low, said.high)))
        for item in items:
            costs = item.costs
            alone = {"teacher": costs.teacher.work_s} | {one.name: one.work_s for one in costs.students}
            parts = ", ".join(f"{part} {seconds:.3g}" for part, seconds in alone.items())
            notes.append(f"{name}: s on a core {parts}; {costs.source}")
        # Far less than a step takes: cores were idle, or at work for somebody else.
        notes.append(
            f"{name}: off by {errors[-1]:.1%}; {cpu_s:.3g} processor seconds a step, {cpu_s / _cores():.3g} a core"
        )
    return Claim(
        claim="the step time of a distillation is as the planner predicts from a minute of measuring",
        figure=max(errors),
        unit="largest relative error of a prediction of a stage's step time",
        goal=GOAL,
        limit=0.0,
        arms=arms,
        notes=notes,
    )


def _step_s(item: StageSplit) -> float:
    """Predicted, with one teacher and a worker for each student."""
    costs = item.costs
    workers = dict.fromkeys((one.name for one in costs.students), 1)
    return predicted(costs.teacher, costs.students, _cores(), 1, workers, shared=True).step_s


def _cores() -> int:
    from orchestrator.capacity.measured_costs import cores

    return cores()
