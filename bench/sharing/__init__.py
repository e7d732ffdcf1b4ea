"""Students that share one teacher take 0.95 of the time that arithmetic allows, or less, against separate runs.

Three students, at once in both arms: with one teacher for all, and each with a teacher of its own. Both arms have
more processes than the machine has cores, so that every core is busy. A round is one step of every student. What is
compared is the time of a round; the bound is what arithmetic allows, (n·C_T + ΣC_S) / (C_T + ΣC_S), with the costs of
teacher and students as their processes' time in the arm of separate runs. η is the measured ratio over the bound.

No student may cost more than half of a round, or it would hold the others up in one arm and not in the other.

The students of both arms must end with the same weights and losses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import Claim, UnfairError, summarize
from bench.sharing.arms import Stand, standing
from bench.sharing.linear import line_of, plot
from bench.sharing.transport import transport_share
from bench.sharing.watching import Measured

STUDENTS = {"a": "vit_femto", "b": "vit_pico", "c": "vit_femto"}
CROWDS = (1, 2, 4, 8)
GOAL = 0.95
WEIGHTS = 1e-4
RESULTS = Path(__file__).parents[1] / "results" / "sharing.json"
PICTURE = Path(__file__).parents[2] / "docs" / "sharing.png"


def run(quick: bool, repetitions: int = 5, steps: int = 40) -> Claim:
    """One repetition of 12 steps, five of 40 in the full run, which also draws `docs/sharing.png`.

    Args:
        quick: the small form.
        repetitions: of both arms.
        steps: of every student.
    """
    rounds = 1 if quick else repetitions
    steps = 12 if quick else steps
    shared: list[Measured] = []
    separate: list[Measured] = []
    crowds: dict[int, Measured] = {}
    with standing() as stand:
        for number in range(rounds):
            arms = [(shared, True), (separate, False)]
            for kept, together in arms if number % 2 else reversed(arms):
                kept.append(_measure(stand, STUDENTS, steps, together))
        for size in CROWDS[:2] if quick else CROWDS:
            crowd = {f"s{number}": "vit_femto" for number in range(size)}
            crowds[size] = _measure(stand, crowd, 12 if quick else 24, True)
        share = transport_share(stand, median(one.wall_s for one in shared))
    _require_same(shared, separate)
    return _claim(quick, shared, separate, crowds, share)


def _measure(stand: Stand, students: dict[str, str], steps: int, together: bool) -> Measured:
    measured = stand.measure(students, steps, together)
    what = f"{len(students)} students, {'one teacher' if together else 'a teacher each'}"
    sys.stderr.write(f"{what}: {measured.wall_s:.2f} s a round, {measured.cpu_s:.2f} s of processor time\n")
    return measured


def _require_same(shared: list[Measured], separate: list[Measured]) -> None:
    import torch

    for ours, theirs in zip(shared, separate, strict=True):
        for name, weights in theirs.weights.items():
            for key, value in weights.items():
                gap = (ours.weights[name][key] - value).norm() / value.norm().clamp_min(1e-12)
                if not torch.isfinite(gap) or float(gap) > WEIGHTS:
                    raise UnfairError(
                        f"student {name} learned other weights: {key} differs by {float(gap):.1e}"
                    )
            if abs(ours.last_losses[name] / theirs.last_losses[name] - 1) > WEIGHTS:
                raise UnfairError(f"student {name} ended with another loss")


def _claim(
    quick: bool, shared: list[Measured], separate: list[Measured], crowds: dict[int, Measured], share: float
) -> Claim:
    teacher = median(one.teacher_s for one in separate)
    students = {name: median(one.student_s[name] for one in separate) for name in STUDENTS}
    bound = (len(students) * teacher + sum(students.values())) / (teacher + sum(students.values()))
    wall = [theirs.wall_s / ours.wall_s / bound for ours, theirs in zip(shared, separate, strict=True)]
    cpu = [theirs.cpu_s / ours.cpu_s / bound for ours, theirs in zip(shared, separate, strict=True)]
    line = line_of({size: one.cpu_s for size, one in crowds.items()})
    costs = {size: median(one.student_s.values()) for size, one in crowds.items()}
    around = median(
        one.cpu_s - len(students) * one.teacher_s - sum(one.student_s.values()) for one in separate
    )
    arms = {
        "η, wall time": summarize(wall),
        "η, processor time": summarize(cpu),
        "shared, seconds a round": summarize([one.wall_s for one in shared]),
        "separate, seconds a round": summarize([one.wall_s for one in separate]),
        "shared, processor seconds a round": summarize([one.cpu_s for one in shared]),
        "separate, processor seconds a round": summarize([one.cpu_s for one in separate]),
        **{
            f"{size} students, processor seconds a round": summarize([one.cpu_s])
            for size, one in crowds.items()
        },
        **{
            f"{size} students, processor seconds of a student's own process": summarize(
                list(one.student_s.values())
            )
            for size, one in crowds.items()
        },
    }
    notes = [
        f"costs of a step in processor seconds: teacher {teacher:.3f}, students "
        + ", ".join(f"{STUDENTS[name]} {seconds:.3f}" for name, seconds in students.items())
        + f"; bound {bound:.3f}; around each of the separate runs {around / len(students):.3f}",
        f"1 to {max(crowds)} students: {line.intercept:.3f} + {line.slope:.3f} · n seconds, R² {line.r2:.4f}"
        + "; a student's own process takes "
        + ", ".join(f"{cost:.3f} among {size}" for size, cost in costs.items())
        + ", the teacher's "
        + ", ".join(f"{one.teacher_s:.3f}" for one in crowds.values()),
        f"what the teacher says goes through the object store in {share:.2%} of a round (asked: 2 %)",
    ]
    claim = Claim(
        claim="three students on one teacher against three separate runs: measured ratio over the bound, wall time",
        figure=min(median(wall), median(cpu)),
        unit="η, the worse of wall and processor time",
        goal=GOAL,
        limit=1.0,
        arms=arms,
        notes=notes,
        better="more",
    )
    if not quick:
        _keep(claim, {"intercept": line.intercept, "slope": line.slope, "r2": line.r2, "transport": share})
        plot({size: one.cpu_s for size, one in crowds.items()}, line, costs, PICTURE)
    return claim


def _keep(claim: Claim, more: dict[str, Any]) -> None:
    from bench.harness import as_json

    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({**json.loads(as_json(claim)), **more}, indent=1, ensure_ascii=False) + "\n"
    )
