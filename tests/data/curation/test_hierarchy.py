"""Clusters of clusters, resampling, and samples that are balanced at every level."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.curation.hierarchy import Hierarchy, cluster_levels, draw, typical_rows
from orchestrator.data.curation.kmeans import Clusters
from orchestrator.data.curation.mix import effective_number
from orchestrator.data.curation.vectors import ArrayVectors
from orchestrator.errors import Stopped


def _pool(total: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around 60 centres whose sizes follow Zipf's law, and which centre each is around."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 61)
    true = rng.choice(60, total, p=shares / shares.sum())
    noise = 0.7 * rng.normal(size=(total, 32))
    return (rng.normal(size=(60, 32))[true] + noise).astype(np.float32), true


@pytest.mark.heavy
def test_levels_and_resampling_draw_more_evenly_than_one_level_of_k_means() -> None:
    """By what pictures are of, not by the clusters that are balanced: 60 sorts would be perfect."""
    vectors, true = _pool(3000)

    def even(num_clusters: list[int], resampling: int) -> float:
        levels = cluster_levels(ArrayVectors(vectors), num_clusters, 0, resampling=resampling)
        drawn = draw(levels, 400, 0)
        assert drawn.sum() == 400
        return effective_number(np.bincount(true[drawn], minlength=60).tolist())

    raw, flat = effective_number(np.bincount(true).tolist()), even([60], 0)
    resampled, levels, both = even([60], 3), even([300, 60], 0), even([300, 60], 3)
    assert raw < 30 < flat < 50
    assert flat + 3 < levels
    assert flat + 3 < resampled
    assert both > 55


def test_the_nearest_few_of_each_cluster() -> None:
    rng = np.random.default_rng(0)
    labels, distances = rng.integers(0, 5, 200).astype(np.int32), rng.random(200).astype(np.float32)
    labels[labels == 3] = 0
    labels[:2] = 3
    found = typical_rows(Clusters(np.zeros((5, 2), np.float32), labels, distances, 0.0), 7)
    wanted = []
    for cluster in range(5):
        rows = np.flatnonzero(labels == cluster)
        wanted += rows[np.argsort(distances[rows])][:7].tolist()
    assert found.tolist() == sorted(wanted)
    assert len(found) == 4 * 7 + 2


def test_levels_are_nested_and_numbered_by_size() -> None:
    vectors, _ = _pool(2000)
    levels = cluster_levels(ArrayVectors(vectors), [200, 30, 5], 0, resampling=1)
    columns = levels.of_vectors()
    assert columns.shape == (2000, 3)
    for level, wanted in enumerate((200, 30, 5)):
        sizes = np.bincount(columns[:, level])
        assert len(sizes) == wanted
        assert sizes.min() > 0
        assert np.all(np.diff(sizes) <= 0)
        if level:
            parents = {(fine, coarse) for fine, coarse in columns[:, level - 1 : level + 1].tolist()}
            assert len(parents) == len(np.unique(columns[:, level - 1])), "a cluster is in two"
    assert len(levels.inertias) == 3


@settings(max_examples=50, deadline=None)
@given(
    fine=st.lists(st.integers(1, 30), min_size=4, max_size=12),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_each_levels_clusters_give_min_of_cut_and_size(fine: list[int], share: float, seed: int) -> None:
    """By hand for two levels: within each coarse cluster, and among the coarse ones."""
    rng = np.random.default_rng(seed)
    parents = np.concatenate([np.arange(3), rng.integers(0, 3, len(fine) - 3)])
    labels = np.repeat(np.arange(len(fine)), fine)
    levels = Hierarchy((labels, parents), np.zeros(len(labels)), ())
    target = int(share * len(labels))
    chosen = draw(levels, target, seed)
    assert chosen.sum() == target
    taken, sizes = np.bincount(labels[chosen], minlength=len(fine)), np.array(fine)

    def even(given: np.ndarray, most: np.ndarray) -> None:
        unexhausted = given[given < most]
        if unexhausted.size:
            assert given.max() <= unexhausted.min() + 1

    for parent in range(3):
        even(taken[parents == parent], sizes[parents == parent])
    even(np.bincount(parents, taken), np.bincount(parents, sizes))


def test_what_was_cut_off_goes_on_with_the_same_result(tmp_path: Path) -> None:
    vectors = ArrayVectors(_pool(3000)[0])
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise Stopped

    whole = cluster_levels(vectors, [100, 10], 0, resampling=2)
    with pytest.raises(Stopped):
        cluster_levels(vectors, [100, 10], 0, resampling=2, work=tmp_path, stop=stop)
    assert list(tmp_path.glob("level-0/*.npz"))
    again = cluster_levels(vectors, [100, 10], 0, resampling=2, work=tmp_path)
    assert np.array_equal(whole.of_vectors(), again.of_vectors())
    assert whole.inertias == again.inertias


def test_fewer_different_vectors_than_clusters() -> None:
    vectors = np.repeat(np.eye(6, dtype=np.float32), 10, axis=0)
    levels = cluster_levels(ArrayVectors(vectors), [20, 10, 2], 0, resampling=1)
    columns = levels.of_vectors()
    assert [len(np.unique(column)) for column in columns.T] == [6, 6, 2]
    assert draw(levels, 12, 0).sum() == 12
