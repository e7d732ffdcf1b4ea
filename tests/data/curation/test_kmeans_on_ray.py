"""k-means on a Ray cluster gives what it gives in one process, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.curation import kmeans
from orchestrator.data.curation.block_workers import RayWorkers, ThreadWorkers
from orchestrator.data.curation.kmeans import fit
from orchestrator.data.curation.vectors import FileVectors, open_vectors


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
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


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
