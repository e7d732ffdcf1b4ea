"""Students that share one teacher save 0.95 of what arithmetic allows, or more, against plain loops.

Three students. In one arm the `distill` stage trains them on one teacher. The peer is what a user would write
instead: a plain loop with the teacher inside, once per student, without Ray, DeepSpeed or the service
(`bench/_plain.py`). It is measured all three at once and one after another, and the faster way counts. No cluster is up
while plain loops run. A round is one step of every student.

The bound is what arithmetic allows, (n·C_T + ΣC_S) / (C_T + ΣC_S). C_T is all that the service does once, views
and teacher; C_S is a student's update. Both are processor seconds of a plain loop that has the machine to itself.
η is the measured ratio over the bound, and 1 cannot be beaten.

No student may cost more than half of a round, or it would hold the others up in one arm and not in the other.

The students of both arms must have the same losses, step by step, and end with the same weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import _plain as plain
from bench.harness import Arm, Claim, UnfairError, require_same_losses, summarize
from bench.sharing.arms import Stand, standing
from bench.sharing.linear import Line, line_of, plot
from bench.sharing.transport import transport_s
from bench.sharing.watching import Measured

STUDENTS = {"a": "vit_femto", "b": "vit_pico", "c": "vit_femto"}
CROWDS = (1, 2, 4, 8)
GOAL = 0.95
# Other kernels round otherwise, and AdamW makes whole steps of small gradients: of equal work, not of equal bits.
SAME_LOSSES, SAME_WEIGHTS = 1e-3, 1e-2
RESULTS = Path(__file__).parents[1] / "results" / "sharing.json"
PICTURE = Path(__file__).parents[2] / "docs" / "sharing.png"


@dataclass(frozen=True)
class Repetition:
    """One measurement of all arms.

    Attributes:
        shared: on one teacher.
        at_once: plain loops beside each other.
        in_turn_s: wall seconds of a round of plain loops that run one after another.
        prices: by model.
    """

    shared: Measured
    at_once: list[plain.Done]
    in_turn_s: float
    prices: dict[str, plain.Price]

    @property
    def of_students(self) -> dict[str, plain.Price]:
        """The prices by student."""
        return {name: self.prices[model] for name, model in STUDENTS.items()}

    @property
    def apart(self) -> tuple[float, float]:
        """Wall and processor seconds of a round of plain loops at once."""
        return plain.rounds(self.at_once, list(self.of_students.values()))


def run(quick: bool, repetitions: int = 5, steps: int = 40) -> Claim:
    """One repetition of 12 steps, five of 40 in the full run, which also draws `docs/sharing.png`.

    Args:
        quick: the small form.
        repetitions: of all arms.
        steps: of every student.
    """
    steps = 12 if quick else steps
    crowds: dict[int, Measured] = {}
    with standing() as stand:
        with stand.cluster():
            transport = transport_s(stand)
        found = [_repetition(stand, steps, number) for number in range(1 if quick else repetitions)]
        with stand.cluster():
            for size in CROWDS[:2] if quick else CROWDS:
                crowd = {f"s{number}": "vit_femto" for number in range(size)}
                crowds[size] = _shared(stand, crowd, 12 if quick else 24)
    return _claim(quick, found, crowds, transport / median(one.shared.wall_s for one in found))


def bound(prices: Sequence[plain.Price]) -> float:
    """How many times as long the arm of separate loops must take, if nothing but the work costs anything."""
    # The same teacher and views for all; that its price was taken beside another model changes nothing but noise.
    teacher = median(price.teacher_s for price in prices)
    students = sum(price.student_s for price in prices)
    return (len(prices) * teacher + students) / (teacher + students)


def _repetition(stand: Stand, steps: int, number: int) -> Repetition:
    """All arms once; in turn the first and the last."""
    if number % 2:
        prices, at_once, in_turn_s = _plain(stand, steps)
    with stand.cluster():
        shared = _shared(stand, STUDENTS, steps)
    if not number % 2:
        prices, at_once, in_turn_s = _plain(stand, steps)
    one = Repetition(shared, at_once, in_turn_s, prices)
    _require_same(one)
    return one


def _plain(stand: Stand, steps: int) -> tuple[dict[str, plain.Price], list[plain.Done], float]:
    prices = stand.prices(STUDENTS, steps)
    at_once = stand.loops_at_once(STUDENTS, steps)
    in_turn_s = sum(plain.own_round_s(one) for one in stand.loops_in_turn(STUDENTS, steps))
    wall, cpu = plain.rounds(at_once, [prices[model] for model in STUDENTS.values()])
    sys.stderr.write(
        f"plain loops at once: {wall:.2f} s a round, {cpu:.2f} s of processor time; "
        f"one after another: {in_turn_s:.2f} s a round\n"
    )
    return prices, at_once, in_turn_s


def _shared(stand: Stand, students: Mapping[str, str], steps: int) -> Measured:
    measured = stand.measure(students, steps)
    sys.stderr.write(
        f"{len(students)} students on one teacher: {measured.wall_s:.2f} s a round, "
        f"{measured.cpu_s:.2f} s of processor time\n"
    )
    return measured


def _require_same(one: Repetition) -> None:
    for name, theirs in zip(STUDENTS, one.at_once, strict=True):
        require_same_losses(
            {f"plain loop {name}": theirs.losses, f"student {name}": one.shared.losses[name]}, SAME_LOSSES
        )
        gap = _gap(one.shared.weights[name], plain.weights_of(theirs))
        if not gap <= SAME_WEIGHTS:
            raise UnfairError(f"student {name} learned other weights: they differ by {gap:.1e}")


def _gap(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The norm of the difference over that of the weights."""
    difference = sum(float((ours[key] - value).square().sum()) for key, value in theirs.items())
    return float((difference / sum(float(value.square().sum()) for value in theirs.values())) ** 0.5)


def _claim(quick: bool, found: Sequence[Repetition], crowds: Mapping[int, Measured], share: float) -> Claim:
    # One bound from all prices: a price of one repetition has more noise than the arms have.
    prices = {
        name: plain.Price(
            median(one.of_students[name].teacher_s for one in found),
            median(one.of_students[name].student_s for one in found),
        )
        for name in STUDENTS
    }
    limit = bound(list(prices.values()))
    at_once, in_turn = [one.apart[0] for one in found], [one.in_turn_s for one in found]
    apart = min(at_once, in_turn, key=median)
    wall = [theirs / one.shared.wall_s / limit for theirs, one in zip(apart, found, strict=True)]
    cpu = [one.apart[1] / one.shared.cpu_s / limit for one in found]
    line = line_of({size: one.cpu_s for size, one in crowds.items()})
    costs = {size: median(one.student_s.values()) for size, one in crowds.items()}
    arms = {
        "η, wall time": summarize(wall),
        "η, processor time": summarize(cpu),
        "shared, seconds a round": summarize([one.shared.wall_s for one in found]),
        "plain loops at once, seconds a round": summarize(at_once),
        "plain loops one after another, seconds a round": summarize(in_turn),
        "shared, processor seconds a round": summarize([one.shared.cpu_s for one in found]),
        "plain loops at once, processor seconds a round": summarize([one.apart[1] for one in found]),
        **_price_arms(found),
        **_crowd_arms(crowds),
    }
    notes = [
        f"the bound: three plain loops take {limit:.3f} times what one teacher and three students do",
        f"1 to {max(crowds)} students: {line.intercept:.3f} + {line.slope:.3f} · n seconds, R² {line.r2:.4f}"
        + "; a student's own process takes "
        + ", ".join(f"{cost:.3f} among {size}" for size, cost in costs.items())
        + ", the teacher's "
        + ", ".join(f"{one.teacher_s:.3f}" for one in crowds.values()),
        f"what the teacher says goes through the object store in {share:.2%} of a round (asked: 2 %)",
    ]
    claim = Claim(
        claim="three students on one teacher against a plain loop with the teacher inside for each: measured ratio "
        "of the times over the bound",
        figure=min(median(wall), median(cpu)),
        unit="η, the worse of wall and processor time",
        goal=GOAL,
        limit=1.0,
        arms=arms,
        notes=notes,
        better="more",
    )
    if not quick:
        more = {"intercept": line.intercept, "slope": line.slope, "r2": line.r2, "transport": share}
        _keep(claim, {"bound": limit, **more}, line, crowds, costs)
    return claim


def _price_arms(found: Sequence[Repetition]) -> dict[str, Arm]:
    teachers = [price.teacher_s for one in found for price in one.prices.values()]
    return {
        "price of a step, views and teacher, processor seconds": summarize(teachers),
        **{
            f"price of a step, {model}, processor seconds": summarize(
                [one.prices[model].student_s for one in found]
            )
            for model in found[0].prices
        },
    }


def _crowd_arms(crowds: Mapping[int, Measured]) -> dict[str, Arm]:
    rounds = {
        f"{size} students, processor seconds a round": summarize([one.cpu_s]) for size, one in crowds.items()
    }
    own = {
        f"{size} students, processor seconds of a student's own process": summarize(
            list(one.student_s.values())
        )
        for size, one in crowds.items()
    }
    return rounds | own


def _keep(
    claim: Claim,
    more: dict[str, Any],
    line: Line,
    crowds: Mapping[int, Measured],
    costs: Mapping[int, float],
) -> None:
    from bench.harness import as_json

    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({**json.loads(as_json(claim)), **more}, indent=1, ensure_ascii=False) + "\n"
    )
    plot({size: one.cpu_s for size, one in crowds.items()}, line, costs, PICTURE)
