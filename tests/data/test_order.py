"""The sample order: a pure function of (seed, step) that shows every row once an epoch."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.order import SampleOrder, permute
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
    components = {"a": np.arange(30), "b": np.arange(30, 90)}
    one = SampleOrder(components, homogeneous="a", batch_size=16, seed=4)
    two = SampleOrder(components, homogeneous="a", batch_size=16, seed=4)
    forwards = [one.ids(step) for step in range(40)]
    backwards = [two.ids(step) for step in reversed(range(40))][::-1]
    assert np.array_equal(forwards, backwards)
    assert one.ids(10**12).shape == (16,)
    other = SampleOrder(components, homogeneous="a", batch_size=16, seed=5)
    assert not np.array_equal(forwards, [other.ids(step) for step in range(40)])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_share_of_homogeneous_batches_is_exact_everywhere(ratio: float) -> None:
    order = SampleOrder(
        {"good": np.arange(20), "rest": np.arange(20, 120)}, None, "good", ratio, batch_size=8, seed=9
    )
    kinds = [order.is_homogeneous(step) for step in range(400)]
    for start in (0, 7, 133):
        assert abs(sum(kinds[start : start + 200]) - 200 * ratio) <= 1
    for step, homogeneous in enumerate(kinds):
        assert np.all((order.ids(step) < 20) == homogeneous)


def test_homogeneous_batches_run_through_their_component() -> None:
    order = SampleOrder(
        {"good": np.arange(24), "rest": np.arange(24, 99)}, None, "good", 0.25, batch_size=8, seed=2
    )
    homogeneous = [order.ids(step) for step in range(12) if order.is_homogeneous(step)]
    assert sorted(np.concatenate(homogeneous)) == list(range(24))


def test_a_single_component_serves_both_kinds_of_batches() -> None:
    order = SampleOrder(
        {"only": np.arange(10), "empty": np.arange(0)}, None, "only", 0.5, batch_size=5, seed=0
    )
    assert set(np.concatenate([order.ids(step) for step in range(8)])) == set(range(10))


def test_default_weights_show_all_rows_equally_often() -> None:
    order = SampleOrder({"a": np.arange(30), "b": np.arange(30, 90)}, batch_size=9, seed=0)
    drawn = Counter(np.concatenate([order.ids(step) for step in range(50)]).tolist())
    assert set(drawn.values()) == {5}
    assert len(drawn) == 90


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


def test_awkward_weights_silence_nobody() -> None:
    order = SampleOrder(
        {"a": np.arange(5), "b": np.arange(5, 10)}, {"a": 1e-5, "b": 0.31415926}, batch_size=4096, seed=0
    )
    counts = [np.count_nonzero(order.ids(step) < 5) for step in range(3)]
    assert 1 <= max(counts) <= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": {"a": np.arange(0)}}, "every component is empty"),
        ({"weights": {"poool": 1.0}}, "no component 'poool'.*\n.*hint use 'pool'"),
        ({"homogeneous": "balancd"}, "no component 'balancd'.*\n.*hint use 'balanced'"),
        ({"weights": {"balanced": 0.0}}, "leave nothing to draw from"),
        ({"weights": {"balanced": 2.0, "pool": -1.0}}, "leave nothing to draw from"),
        ({"weights": {"balanced": 1.0}, "homogeneous": "balanced"}, "leave nothing to draw from"),
        ({"homogeneous_ratio": 1.5}, "homogeneous_ratio is 1.5"),
        ({"batch_size": 0}, "batch of 0 samples"),
    ],
)
def test_mistakes_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {
        "components": {"balanced": np.arange(4), "pool": np.arange(4, 9)},
        "batch_size": 2,
        "seed": 0,
    }
    with pytest.raises(UserError) as raised:
        SampleOrder(**{**arguments, **changes})  # type: ignore[arg-type]
    assert re.search(message, str(raised.value))
