"""Drawing evenly from clusters."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.curation.sampling import fill
from orchestrator.data.rng import generator


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), share=st.floats(0, 1))
def test_fill_is_min_of_cut_and_size(sizes: list[int], share: float) -> None:
    target = int(share * sum(sizes))
    taken = fill(sizes, target, generator(0))
    assert taken.sum() == target
    assert np.all(taken <= sizes)
    # Whoever still has some left gave as much as anybody, up to the one that makes up the remainder.
    unexhausted = taken[taken < np.array(sizes)]
    if unexhausted.size:
        assert taken.max() <= unexhausted.min() + 1


def test_fill_by_hand() -> None:
    assert fill([100, 10, 3], 33, generator(0)).tolist() == [20, 10, 3]
    assert fill([5, 5], 10, generator(0)).tolist() == [5, 5]
    assert fill([5, 0], 0, generator(0)).tolist() == [0, 0]
