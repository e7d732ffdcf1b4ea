"""k-means on a Ray cluster gives what it gives in one process, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from orchestrator.config.schema import Cluster
from orchestrator.data.curation import kmeans, ray_vectors
from orchestrator.data.curation.block_workers import RayWorkers, ThreadWorkers
from orchestrator.data.curation.hierarchy import cluster_levels
from orchestrator.data.curation.kmeans import fit
from orchestrator.data.curation.ray_vectors import RayVectors, in_object_store
from orchestrator.data.curation.vectors import FileVectors, SomeVectors, open_vectors
from orchestrator.elastic import cluster


@dataclass(frozen=True)
class KillsItsWorker:
    """Vectors of a file. The first process that reads one of two of its blocks is killed."""

    vectors: FileVectors
    marks: Path

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        mark = self.marks / f"{start}-killed"
        if start in (1000, 3500) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.vectors.read(start, stop)

    def take(self, rows_n: np.ndarray) -> np.ndarray:
        return self.vectors.take(rows_n)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with cluster.start(Cluster()):
        yield


@pytest.mark.usefixtures("ray")
def test_killed_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "vectors.npy"
    np.save(path, (rng.normal(size=(40, 16))[rng.integers(40, size=4000)] + rng.normal(size=(4000, 16))))
    vectors = open_vectors(path)
    monkeypatch.setattr(kmeans, "_BLOCK_BYTES", 500 * 16 * 4)
    plain = fit(vectors, 150, 0, iterations=6, workers=ThreadWorkers(1))
    there = fit(KillsItsWorker(vectors, tmp_path), 150, 0, iterations=6, workers=RayWorkers(2))
    assert len(list(tmp_path.glob("*-killed"))) == 2, "no worker was killed"
    assert there.labels_N.tobytes() == plain.labels_N.tobytes()
    assert there.centres_KD.tobytes() == plain.centres_KD.tobytes()
    assert there.history == plain.history


@pytest.mark.usefixtures("ray")
def test_a_file_is_sent_once_and_gives_the_levels_that_threads_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "vectors.npy"
    np.save(path, rng.normal(size=(2500, 16)).astype(np.float32))
    vectors = open_vectors(path)
    monkeypatch.setattr(ray_vectors, "_BLOCK_BYTES", 700 * 16 * 4)
    monkeypatch.setattr(kmeans, "_BLOCK_BYTES", 500 * 16 * 4)
    plain = cluster_levels(vectors, [120, 9], 3, resampling=1, workers=ThreadWorkers(1))
    workers = RayWorkers(2)
    there = cluster_levels(vectors, [120, 9], 3, resampling=1, workers=workers)
    assert there.of_vectors().tobytes() == plain.of_vectors().tobytes()
    assert there.distances_N.tobytes() == plain.distances_N.tobytes()
    assert there.inertias == plain.inertias
    (sent,) = workers._files.values()
    assert len(sent.blocks) == 4


@pytest.mark.usefixtures("ray")
def test_vectors_in_the_object_store_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    path = tmp_path / "vectors.npy"
    np.save(path, rng.normal(size=(101, 5)).astype(np.float32))
    vectors = open_vectors(path)
    monkeypatch.setattr(ray_vectors, "_BLOCK_BYTES", 10 * 5 * 4)
    rows = rng.permutation(101)[:40]
    sent = in_object_store(SomeVectors(vectors, rows), {})
    path.unlink()
    assert isinstance(sent, SomeVectors)
    assert isinstance(sent.vectors, RayVectors)
    whole = np.random.default_rng(2).normal(size=(101, 5)).astype(np.float32)
    for start, stop in ((0, 101), (0, 10), (9, 11), (95, 101), (30, 61), (7, 7)):
        assert np.array_equal(sent.vectors.read(start, stop), whole[start:stop])
    assert np.array_equal(sent.vectors.take(rows), whole[rows])
    assert np.array_equal(sent.read(3, 20), whole[rows[3:20]])
