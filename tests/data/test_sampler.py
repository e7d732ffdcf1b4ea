"""The sample order: a pure function of (seed, step) that shows every row once an epoch."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.data.sampler import SampleOrder, permute
from orchestrator.errors import UserError


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


def test_permute_works_on_parts_and_on_huge_ranges() -> None:
    whole = permute(np.arange(1000), 1000, 5)
    assert np.array_equal(permute(np.array([[3, 999]]), 1000, 5), whole[[[3, 999]]])
    n = 2**40 + 1
    far = permute(np.array([0, 1, n - 1]), n, 5)
    assert len(set(far.tolist())) == 3
    assert all(0 <= value < n for value in far.tolist())


def test_permute_looks_random() -> None:
    n = 1000
    ranks = np.array([permute(np.arange(n), n, key) for key in range(200)])
    # Every position is uniform over the range, and neighbours do not stay neighbours.
    assert np.abs(ranks.mean(0) - (n - 1) / 2).max() < 5 * n / np.sqrt(12 * 200)
    correlation = [np.corrcoef(rank[:-1], rank[1:])[0, 1] for rank in ranks]
    assert abs(np.mean(correlation)) < 0.02
    fixed = (ranks == np.arange(n)).sum(1).mean()
    assert 0.6 < fixed < 1.5


def test_order_is_pinned() -> None:
    order = SampleOrder({"all": np.arange(100)}, batch_size=6, seed=1)
    assert order.ids(3).tolist() == [8, 11, 45, 92, 54, 94]


def test_every_epoch_is_a_fresh_permutation() -> None:
    rows = np.arange(50, 97)
    order = SampleOrder({"all": rows}, batch_size=8, seed=0)
    drawn = np.concatenate([order.ids(step) for step in range(60)])
    epochs = drawn[: 47 * 10].reshape(10, 47)
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_steps_do_not_depend_on_earlier_steps() -> None:
    parts, weights, source = (
        {"a": np.arange(30), "b": np.arange(30, 90)},
        {"a": 0.4, "b": 0.6},
        np.arange(25, 50),
    )
    one = SampleOrder(parts, weights, (source, 0.1), batch_size=16, seed=4)
    two = SampleOrder(parts, weights, (source, 0.1), batch_size=16, seed=4)
    forwards = [one.ids(step) for step in range(40)]
    backwards = [two.ids(step) for step in reversed(range(40))][::-1]
    assert np.array_equal(forwards, backwards)
    assert one.ids(10**12).shape == (16,)
    other = SampleOrder(parts, weights, (source, 0.1), batch_size=16, seed=5)
    assert not np.array_equal(forwards, [other.ids(step) for step in range(40)])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_share_of_homogeneous_batches_is_exact_everywhere(ratio: float) -> None:
    order = SampleOrder({"rest": np.arange(20, 120)}, None, (np.arange(20), ratio), batch_size=8, seed=9)
    kinds = [order.is_homogeneous(step) for step in range(400)]
    for start in (0, 7, 133):
        assert abs(sum(kinds[start : start + 200]) - 200 * ratio) <= 1
    for step, homogeneous in enumerate(kinds):
        assert np.all((order.ids(step) < 20) == homogeneous)
    rows = {0.0: range(20, 120), 1.0: range(20)}.get(ratio, range(120))
    assert order.rows.tolist() == list(rows)


def test_homogeneous_batches_run_through_their_source() -> None:
    order = SampleOrder({"rest": np.arange(24, 99)}, None, (np.arange(24), 0.25), batch_size=8, seed=2)
    homogeneous = [order.ids(step) for step in range(12) if order.is_homogeneous(step)]
    assert sorted(np.concatenate(homogeneous)) == list(range(24))


def test_one_set_of_rows_serves_both_kinds_of_batches() -> None:
    order = SampleOrder(
        {"only": np.arange(10), "empty": np.arange(0)}, None, (np.arange(10), 0.5), batch_size=5, seed=0
    )
    for kind in (True, False):
        drawn = [order.ids(step) for step in range(8) if order.is_homogeneous(step) == kind]
        assert Counter(np.concatenate(drawn).tolist()) == dict.fromkeys(range(10), 2)


def test_without_weights_every_row_comes_once_an_epoch() -> None:
    """Also a row of two parts, and to the row where the parts' sizes have no short ratio."""
    parts = {"a": np.arange(5003), "b": np.arange(4000, 9001), "empty": np.arange(0)}
    order = SampleOrder(parts, batch_size=9001, seed=0)
    for epoch in range(3):
        assert sorted(order.ids(epoch)) == list(range(9001))
    assert order.rows.tolist() == list(range(9001))


def test_weights_are_kept_exactly() -> None:
    order = SampleOrder(
        {"a": np.arange(10), "b": np.arange(10, 500), "c": np.arange(500, 510)},
        {"a": 0.7, "b": 0.3},
        batch_size=10,
        seed=0,
    )
    for step in range(30):
        drawn = order.ids(step)
        assert np.count_nonzero(drawn < 10) == 7
        assert drawn.max() < 500
    assert order.rows.tolist() == list(range(500))


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 3000), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_weights_are_exact_over_every_cycle(counts: list[int], seed: int) -> None:
    """Each part's share of a cycle of slots is its weight to the draw, and within it no row comes ahead of another."""
    parts = {str(at): np.arange(at * 7, at * 7 + 7) for at in range(len(counts))}
    weights = {str(at): count / 1000 for at, count in enumerate(counts)}
    order = SampleOrder(parts, weights, batch_size=sum(counts), seed=seed)
    total = np.zeros(7 * len(counts), dtype=np.int64)
    for step in range(3):
        drawn = np.bincount(order.ids(step), minlength=7 * len(counts))
        total += drawn
        assert drawn.reshape(-1, 7).sum(1).tolist() == counts
    by_part = total.reshape(-1, 7)
    assert (by_part.max(1) - by_part.min(1)).max() <= 1


@pytest.mark.parametrize("weights", [(3e-7, 6e-7), (1e-9, 2e-9), (2e-7, 4e-7), (5e-20, 1e-19)])
def test_small_weights_keep_their_ratio(weights: tuple[float, float]) -> None:
    parts = {"a": np.arange(5), "b": np.arange(5, 10)}
    order = SampleOrder(parts, dict(zip("ab", weights, strict=True)), batch_size=3, seed=0)
    assert [np.count_nonzero(order.ids(step) < 5) for step in range(4)] == [1] * 4


@pytest.mark.heavy
def test_the_smallest_share_comes_once_in_a_million() -> None:
    parts = {"a": np.arange(5), "b": np.arange(5, 10)}
    order = SampleOrder(parts, {"a": 1e-6, "b": 1 - 1e-6}, batch_size=10**6, seed=0)
    assert [np.count_nonzero(order.ids(step) < 5) for step in range(2)] == [1, 1]


def test_a_row_of_two_parts_is_drawn_for_both() -> None:
    parts = {"few": np.arange(4), "all": np.arange(16)}
    order = SampleOrder(parts, {"few": 1.0, "all": 1.0}, batch_size=32, seed=3)
    assert np.bincount(order.ids(5)).tolist() == [5] * 4 + [1] * 12


@pytest.mark.heavy
def test_awkward_weights_silence_nobody() -> None:
    order = SampleOrder(
        {"a": np.arange(5), "b": np.arange(5, 10)}, {"a": 1e-7, "b": 0.31415926}, batch_size=10**6, seed=0
    )
    counts = [np.count_nonzero(order.ids(step) < 5) for step in range(3)]
    assert 1 <= max(counts) <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": {"a": np.arange(0)}}, "the mix is empty"),
        ({"weights": {"poool": 1.0}}, "no photos of 'poool'.*\n.*hint use 'pool'"),
        ({"homogeneous": (np.arange(0), 0.1)}, "no photos for homogeneous batches"),
        ({"weights": {"balanced": 0.0}}, "leave nothing to draw from"),
        ({"weights": {"balanced": 2.0, "pool": -1.0}}, "the weight of 'pool' is -1.0"),
        ({"homogeneous": (np.arange(3), 1.5)}, "homogeneous_ratio is 1.5"),
        ({"batch_size": 0}, "batch of 0 samples"),
    ],
)
def test_mistakes_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {
        "parts": {"balanced": np.arange(4), "pool": np.arange(4, 9)},
        "batch_size": 2,
        "seed": 0,
    }
    with pytest.raises(UserError) as raised:
        SampleOrder(**{**arguments, **changes})  # type: ignore[arg-type]
    assert re.search(message, str(raised.value))


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-3, 0.3, 1.0, 2.0, 50.0, 1e300]), min_size=2, max_size=40),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_has_each_row_as_often_as_its_weight_says(weights: list[float], seed: int) -> None:
    """Its share of the epoch rounded up or down, and the same for steps asked one by one and in any order."""
    assume(any(weights))
    weights_N = np.array(weights)
    size = int((weights_N > 0).sum())
    order = SampleOrder({"all": np.arange(len(weights))}, batch_size=size, seed=seed, row_weights=weights_N)
    shares = size * (weights_N / weights_N.max() / (weights_N / weights_N.max()).sum())
    for epoch in (5, 0):
        counts = np.bincount(order.ids(epoch), minlength=len(weights))
        assert np.all(np.abs(counts - shares) < 1 + 1e-6)
        assert not counts[weights_N == 0].any()


def test_draws_follow_weights_within_each_part_over_many_epochs() -> None:
    """The mix keeps its shares, and each row its share of its part; also in homogeneous batches."""
    rng = np.random.default_rng(0)
    weights_N = rng.lognormal(size=300)
    weights_N[::7] = 0
    parts = {"a": np.arange(100), "b": np.arange(100, 220)}
    order = SampleOrder(
        parts,
        {"a": 0.25, "b": 0.75},
        (np.arange(220, 300), 0.2),
        batch_size=200,
        seed=1,
        row_weights=weights_N,
    )
    drawn = np.zeros(300)
    for step in range(100):
        np.add.at(drawn, order.ids(step), 1)
    for rows, total in ((np.arange(100), 4000), (np.arange(100, 220), 12000), (np.arange(220, 300), 4000)):
        wanted = total * weights_N[rows] / weights_N[rows].sum()
        assert drawn[rows].sum() == total
        # Independent draws would be off by their square root: 10 and more.
        assert np.abs(drawn[rows] - wanted).max() < 3
    assert set(order.rows.tolist()) == set(np.flatnonzero(weights_N).tolist())


def test_equal_weights_change_nothing() -> None:
    parts = {"a": np.arange(9), "b": np.arange(9, 30)}
    plain = SampleOrder(parts, {"a": 1.0, "b": 2.0}, batch_size=11, seed=5)
    weighted = SampleOrder(parts, {"a": 1.0, "b": 2.0}, batch_size=11, seed=5, row_weights=np.full(30, 0.5))
    for step in range(8):
        assert plain.ids(step).tolist() == weighted.ids(step).tolist()
