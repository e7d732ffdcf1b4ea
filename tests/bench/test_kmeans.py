"""What `python -m bench kmeans` compares: the same vectors, and inertia that is no worse; nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import kmeans
from bench.harness import UnfairError


def test_vectors_have_length_one_and_are_the_same_each_time() -> None:
    vectors = kmeans.made_vectors(500, 16)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert np.array_equal(vectors, kmeans.made_vectors(500, 16))
    assert not np.array_equal(vectors, kmeans.made_vectors(500, 16, seed=1))


def test_arms_are_compared_at_the_peers_inertia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "QUICK", ((2000, 16, 20, 1, 1.0),))
    monkeypatch.setattr(kmeans, "_peer", lambda: "scikit-learn")
    claim = kmeans.run(quick=True, on_disk=False)
    assert len(claim.arms) == 3
    assert "2,000 x 16 -> 20: inertia" in claim.notes[1]
    monkeypatch.setattr(kmeans, "_PEERS", {"scikit-learn": lambda vectors, clusters: 1e-3})
    with pytest.raises(UnfairError, match=r"scikit-learn has 0\.001"):
        kmeans.run(quick=True, on_disk=False)
