"""k-means: nearest centres and inertia against brute force and scikit-learn, and one result however it is divided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from orchestrator.data.curation import kmeans
from orchestrator.data.curation.block_workers import ThreadWorkers
from orchestrator.data.curation.kmeans import Clusters, assign, fit
from orchestrator.data.curation.nearest import Around, nearest, with_norms
from orchestrator.data.curation.vectors import ArrayVectors, open_vectors
from orchestrator.errors import Stopped, UserError


def _vectors(total: int = 3000, dim: int = 24, seed: int = 0) -> np.ndarray:
    """Heaps whose sizes follow Zipf's law, on a curved surface."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 61)
    heaps = rng.normal(size=(60, 6))[rng.choice(60, total, p=shares / shares.sum())]
    inner = heaps + 0.4 * rng.normal(size=(total, 6))
    return np.tanh(inner @ rng.normal(size=(6, dim)) / 2).astype(np.float32)


def _squares(vectors_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """Squared distances by their definition, (N, K)."""
    return cdist(vectors_ND.astype(np.float64), centres_KD.astype(np.float64), "sqeuclidean")


def _same(one: Clusters, other: Clusters) -> bool:
    return (
        one.centres_KD.tobytes() == other.centres_KD.tobytes()
        and one.labels_N.tobytes() == other.labels_N.tobytes()
        and one.history == other.history
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred rows of 24 numbers, so that 3,000 rows are thirty blocks."""
    monkeypatch.setattr(kmeans, "_BLOCK_BYTES", 100 * 24 * 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_clusters", [7, 300])
def test_rows_are_with_the_nearest_centre_and_centres_are_means(num_clusters: int) -> None:
    vectors = _vectors()
    found = fit(ArrayVectors(vectors), num_clusters, 0, tolerance=0, iterations=60)
    squares = _squares(vectors, found.centres_KD)
    own = squares[np.arange(len(vectors)), found.labels_N]
    assert np.all(own <= squares.min(1) * (1 + 1e-5) + 1e-5)
    np.testing.assert_allclose(found.distances_N, own, rtol=1e-4, atol=1e-6)
    assert found.inertia == pytest.approx(own.sum(), rel=1e-6)
    assert found.sizes.min() > 0
    means = np.array([vectors[found.labels_N == k].mean(0, dtype=np.float64) for k in range(num_clusters)])
    assert len(found.history) < 60
    # The last pass may still have moved a row or two.
    least = ((vectors - means[found.labels_N]) ** 2).sum(dtype=np.float64)
    assert least == pytest.approx(found.inertia, rel=1e-5)
    gains = -np.diff(found.history)
    assert gains.min() > -1e-6 * found.inertia


@pytest.mark.parametrize("num_clusters", [10, 200])
def test_inertia_is_no_worse_than_that_of_scikit_learn(num_clusters: int) -> None:
    """The means over five seeds: a single one may be lucky."""
    vectors = _vectors(2000)
    ours = [fit(ArrayVectors(vectors), num_clusters, seed).inertia for seed in range(5)]
    theirs = [KMeans(num_clusters, n_init=1, random_state=seed).fit(vectors).inertia_ for seed in range(5)]
    assert np.mean(ours) < 1.01 * np.mean(theirs)


@pytest.mark.heavy
@pytest.mark.usefixtures("small_blocks")
def test_one_result_for_any_number_of_workers_in_memory_and_in_a_file(tmp_path: Path) -> None:
    vectors = _vectors()
    np.save(tmp_path / "vectors.npy", vectors)
    one = fit(ArrayVectors(vectors), 200, 3, workers=ThreadWorkers(1))
    assert _same(one, fit(ArrayVectors(vectors), 200, 3, workers=ThreadWorkers(3)))
    assert _same(one, fit(open_vectors(tmp_path / "vectors.npy"), 200, 3, workers=ThreadWorkers(2)))
    assert not _same(one, fit(ArrayVectors(vectors), 200, 4))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("after", [1, 3, 9])
def test_a_run_that_was_cut_off_goes_on(after: int, tmp_path: Path) -> None:
    vectors = ArrayVectors(_vectors())
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise Stopped

    whole = fit(vectors, 200, 0)
    with pytest.raises(Stopped):
        fit(vectors, 200, 0, work=tmp_path, stop=stop)
    calls = 100
    assert _same(whole, fit(vectors, 200, 0, work=tmp_path, stop=stop))
    assert calls == 100 + len(whole.history) - after


def test_what_another_run_saved_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(ArrayVectors(_vectors(seed=1)), 20, 0, work=tmp_path)
    plain = fit(ArrayVectors(_vectors()), 20, 0)
    assert _same(plain, fit(ArrayVectors(_vectors()), 20, 0, work=tmp_path))
    assert not caplog.records
    (tmp_path / "kmeans-0.npz").write_bytes(b"PK\x03\x04 cut off")
    assert _same(plain, fit(ArrayVectors(_vectors()), 20, 0, work=tmp_path))
    assert "kmeans-0.npz cannot be read" in caplog.text


def test_a_far_origin_costs_no_digits() -> None:
    vectors = np.round(_vectors() * 64).astype(np.float32)
    near, far = (fit(ArrayVectors(vectors + shift), 50, 0) for shift in (0, 2**16))
    assert np.array_equal(near.labels_N, far.labels_N)
    assert far.inertia == pytest.approx(near.inertia, rel=1e-6)


def test_clusters_that_lose_their_rows_get_others() -> None:
    """Five far heaps and one of most rows: from first centres that are all in one place, others are reached."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1000, 8)).astype(np.float32)
    vectors[:50] += 100 * np.repeat(np.eye(8, dtype=np.float32)[:5], 10, axis=0)
    model = kmeans._Model(ArrayVectors(vectors), ThreadWorkers(1), lambda: None)
    first = np.tile(vectors[500] - vectors.mean(0), (6, 1)).astype(np.float32)
    saved = kmeans._FitState(first, None, (), None)

    class Given(kmeans._State):
        def load(self) -> kmeans._FitState:
            return saved

    found = model.fit(6, 0, 40, 0.0, Given(None, ()))
    assert found.sizes.min() > 0
    assert found.sizes[found.labels_N[500]] >= 950
    # Of six clusters for six heaps, at most two heaps are together.
    assert len({tuple(np.unique(found.labels_N[first : first + 10])) for first in range(0, 50, 10)}) >= 4


def test_fewer_different_vectors_than_clusters() -> None:
    vectors = np.repeat(_vectors(5), 20, axis=0)
    found = fit(ArrayVectors(vectors), 8, 0)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert len(np.unique(found.labels_N)) == 5
    same = fit(ArrayVectors(np.ones((10, 3), np.float32)), 4, 0)
    assert (same.inertia, same.sizes.sum()) == (0, 10)


def test_assign_finds_the_nearest_of_given_centres() -> None:
    vectors, centres = _vectors(), _vectors(150, seed=5)
    found = assign(ArrayVectors(vectors), centres)
    assert np.array_equal(found.labels_N, _squares(vectors, centres).argmin(1))
    assert np.array_equal(found.centres_KD, centres)


def test_what_cannot_be_clustered() -> None:
    vectors = _vectors(20)
    with pytest.raises(ValueError, match="21 clusters cannot be made of 20 vectors"):
        fit(ArrayVectors(vectors), 21, 0)
    for wrong in (np.nan, np.inf):
        vectors[3, 1] = wrong
        with pytest.raises(ValueError, match="not finite"):
            fit(ArrayVectors(vectors), 2, 0)


@pytest.mark.parametrize(("total", "num_centres"), [(1, 1), (300, 1100), (700, 2049)])
def test_tiles_give_what_one_product_gives(total: int, num_centres: int) -> None:
    rows, centres = _vectors(total, 12), _vectors(num_centres, 12, seed=2)
    ones = np.concatenate([rows, np.ones((total, 1), np.float32)], axis=1)
    labels, scores = nearest(ones, with_norms(centres))
    squares = _squares(rows, centres)
    own = squares[np.arange(total), labels]
    np.testing.assert_allclose(own, squares.min(1), atol=1e-5)
    np.testing.assert_allclose((rows**2).sum(1) - 2 * scores, own, atol=1e-4)


def test_of_equally_near_centres_the_first_is_taken() -> None:
    centres = np.tile(np.eye(4, dtype=np.float32), (400, 1))
    ones = np.concatenate([np.eye(4, dtype=np.float32), np.ones((4, 1), np.float32)], axis=1)
    assert nearest(ones, with_norms(centres))[0].tolist() == [0, 1, 2, 3]


def test_neighbours_are_never_worse_and_nearly_always_the_nearest() -> None:
    vectors = _vectors()
    centres = vectors[np.random.default_rng(9).permutation(len(vectors))[:400]]
    centres_KE = with_norms(centres)
    ones = np.concatenate([vectors, np.ones((len(vectors), 1), np.float32)], axis=1)
    old, _ = nearest(ones, centres_KE)
    moved = centres + 0.05 * np.random.default_rng(0).normal(size=centres.shape).astype(np.float32)
    around = Around.of(moved)
    assert around is not None
    assert sum(map(len, around.members)) / len(around.members) < 200
    found, _ = around.nearest(ones, with_norms(moved), old)
    squares = _squares(vectors, moved)
    place = np.arange(len(vectors))
    assert np.all(squares[place, found] <= squares[place, old] + 1e-5)
    assert squares[place, found].sum() < 1.001 * squares.min(1).sum()
    assert squares[place, old].sum() > 1.005 * squares.min(1).sum()
    assert Around.of(centres[:100]) is None


def test_vectors_in_a_file(tmp_path: Path) -> None:
    vectors = _vectors(50, 7)
    path = tmp_path / "vectors.npy"
    for dtype in ("float16", "float32", "float64"):
        np.save(path, vectors.astype(dtype))
        opened = open_vectors(path)
        assert opened.shape == (50, 7)
        wanted = vectors.astype(dtype).astype(np.float32)
        assert np.array_equal(opened.read(3, 20), wanted[3:20])
        rows = np.array([7, 8, 9, 2, 49, 0, 1])
        assert np.array_equal(opened.take(rows), wanted[rows])


def test_files_that_are_no_vectors(tmp_path: Path) -> None:
    path = tmp_path / "vectors.npy"

    def said() -> str:
        with pytest.raises(UserError, match="write it with numpy") as raised:
            open_vectors(path)
        return str(raised.value)

    assert "No such file" in said()
    path.write_bytes(b"something else")
    assert "no vectors can be read" in said()
    np.save(path, np.array([["a"]], dtype=object), allow_pickle=True)
    assert "numbers of type object" in said()
    np.save(path, np.zeros(4, np.float32))
    assert "1 axes" in said()
    np.save(path, np.zeros((40, 4), np.float32))
    path.write_bytes(path.read_bytes()[:-1])
    assert "shorter than its head says" in said()
