"""The plain loop that `python -m bench sharing` measures against, and how its figure is computed; nothing is timed."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench.sharing as sharing
from bench import _plain as plain
from bench._plain import Done, Price
from bench.harness import UnfairError
from bench.sharing import arms
from bench.sharing.watching import Measured
from orchestrator.data.index import ImageIndex, ImageRecord


def done(begin: float, step_s: float, steps: int, cpu_share: float = 1.0) -> Done:
    wall = [begin + step_s * (number + 1) for number in range(steps)]
    cpu = [cpu_share * (moment - begin) for moment in wall]
    return Done(wall, cpu, [0.25 * second for second in cpu], [1.0] * steps, "")


def test_a_round_is_one_step_of_every_student() -> None:
    """Two alike, then one that is twice as fast: a round of work 4 takes as long as both have done it."""
    alike = [done(100.0, 2.0, 20), done(100.0, 2.0, 20)]
    assert plain.rounds(alike, [Price(1.0, 1.0)] * 2) == pytest.approx((2.0, 4.0))
    unlike = [done(100.0, 2.0, 20), done(100.0, 1.0, 40)]
    assert plain.rounds(unlike, [Price(1.0, 2.0), Price(1.0, 0.0)])[0] == pytest.approx(4 / (3 / 2 + 1))


def test_only_the_time_in_which_all_are_at_work_counts() -> None:
    """Who is left alone at the end gets faster, and that is not a speed of this arm."""
    alone = done(0.0, 1.0, 30)
    alone.wall[10:] = [10 + 0.1 * number for number in range(1, 21)]
    assert plain.rounds([done(0.0, 1.0, 10), alone], [Price(1.0, 1.0)] * 2)[0] == pytest.approx(1.0)


def test_the_price_is_split_where_views_are_made_within_the_step() -> None:
    found = plain.price(done(0.0, 2.0, 12))
    assert (found.teacher_s, found.student_s) == pytest.approx((0.5, 1.5))


def test_the_bound_counts_the_teacher_once_for_each_loop() -> None:
    assert sharing.bound([Price(2.0, 1.0), Price(2.0, 3.0)]) == pytest.approx((2 * 2 + 4) / (2 + 4))
    assert sharing.bound([Price(2.0, 1.0)]) == 1.0


def repetition(shared_s: float, apart_s: float, in_turn_s: float) -> sharing.Repetition:
    shared = Measured(shared_s, 2 * shared_s, 0.0, dict.fromkeys(sharing.STUDENTS, 0.0), {}, {})
    loops = [done(0.0, apart_s, 12, 2 / 3) for _ in sharing.STUDENTS]
    return sharing.Repetition(
        shared, loops, in_turn_s, dict.fromkeys(set(sharing.STUDENTS.values()), Price(1, 1))
    )


@pytest.mark.parametrize(("in_turn_s", "eta"), [(9.0, 0.8), (1.0, 1 / 2 / 1.5)])
def test_its_figure_is_against_the_faster_of_the_peers(in_turn_s: float, eta: float) -> None:
    """Prices of 1 and 1 allow (3 + 3) / (1 + 3) = 1.5; loops at once take 2.4 s, on one teacher 2 s."""
    crowd = {size: Measured(1.0, float(size), 1.0, {"s": 0.5}, {}, {}) for size in (1, 2)}
    claim = sharing._claim(True, [repetition(2.0, 2.4, in_turn_s)], crowd, 0.01)
    assert claim.arms["η, wall time"].median == pytest.approx(eta)
    assert claim.arms["η, processor time"].median == pytest.approx(2.4 * 2 / 4 / 1.5)
    assert claim.figure == pytest.approx(min(eta, 0.8))
    assert (claim.limit, claim.met) == (1.0, False)


def test_arms_that_learned_something_else_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    save_file({"w": torch.ones(4)}, path)
    loops = [Done([1.0] * 6, [1.0] * 6, [1.0] * 6, [2.0] * 6, str(path)) for _ in sharing.STUDENTS]
    good = {name: {"w": torch.ones(4)} for name in sharing.STUDENTS}
    losses = {name: [2.0] * 6 for name in sharing.STUDENTS}
    prices = dict.fromkeys(set(sharing.STUDENTS.values()), Price(1, 1))
    sharing._require_same(sharing.Repetition(Measured(1, 1, 1, {}, good, losses), loops, 1.0, prices))
    wrong = {**losses, "b": [2.0] * 5 + [2.1]}
    with pytest.raises(UnfairError, match="step 5 the loss"):
        sharing._require_same(sharing.Repetition(Measured(1, 1, 1, {}, good, wrong), loops, 1.0, prices))
    other = {**good, "b": {"w": torch.full((4,), 1.1)}}
    with pytest.raises(UnfairError, match="other weights"):
        sharing._require_same(sharing.Repetition(Measured(1, 1, 1, {}, other, losses), loops, 1.0, prices))


def a_stand(folder: Path) -> arms.Stand:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        rows.append(ImageRecord("photos", f"{number}.png", str(folder), "", 40, 40))
    (folder / "index").mkdir()
    ImageIndex(rows).save(folder / "index")
    return arms.Stand(folder, folder / "index", arms._a_teacher(folder))


@pytest.mark.heavy
def test_a_plain_loop_trains_its_student_and_the_ema_follows(tmp_path: Path) -> None:
    stand = a_stand(tmp_path)
    loop = plain.PlainLoop(stand._order("a", sharing.STUDENTS, 2, 1, inline=True))
    modules = loop.modules
    assert modules.ema is not None
    before = {name: param.detach().clone() for name, param in modules.trainable.named_parameters()}
    # Warm-up begins at a rate of 0: the first update moves nothing, the second at a fifth of 1e-3.
    losses = [loop.step(0), loop.step(1)]
    # DINO, and iBOT on the half of the crops that is masked, of prototypes that are not trained; and KoLeo.
    assert losses[0] == pytest.approx(1.5 * math.log(1024), rel=0.1)
    assert loop.teacher_s > 0
    momentum = loop.config.ema.at(1, 2)
    for name, ema in modules.ema.named_parameters():
        now = dict(modules.trainable.named_parameters())[name].detach()
        moved = (now - before[name]).abs().max()
        assert moved <= 5e-4 * 1.2, name
        torch.testing.assert_close(ema, momentum * before[name] + (1 - momentum) * now)
    assert any(not torch.equal(before[name], param) for name, param in modules.trainable.named_parameters())


@pytest.mark.long
@pytest.mark.cluster
def test_loops_run_in_processes_and_are_the_same_with_views_made_beside_the_step(tmp_path: Path) -> None:
    stand = a_stand(tmp_path)
    steps = plain.WARM_UP + 2
    (beside,) = plain.train([stand._order("a", {"a": "vit_femto"}, steps, 1, inline=False)])
    (inline,) = plain.train([stand._order("a", {"a": "vit_femto"}, steps, 1, inline=True)])
    assert len(beside.wall) == steps
    assert beside.losses == inline.losses
    for name, weights in plain.weights_of(beside).items():
        assert torch.equal(weights, plain.weights_of(inline)[name]), name
    found = plain.price(inline)
    assert found.teacher_s > 0
    assert found.student_s > 0


@pytest.mark.cluster
def test_a_loop_that_fails_is_said(tmp_path: Path) -> None:
    stand = a_stand(tmp_path)
    order = replace(
        stand._order("a", {"a": "vit_femto"}, 6, 1, inline=False), recipe=str(tmp_path / "none.json")
    )
    with pytest.raises(UnfairError, match="a plain loop failed"):
        plain.train([order])
