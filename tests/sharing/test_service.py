"""The hand-out of a teacher's steps, with the real actor on a real Ray object store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from orchestrator.elastic import cluster
from orchestrator.sharing.client import SharedBlocks
from orchestrator.sharing.service import Bundle, ShareActor
from orchestrator.spec import Cluster


class CountingTeacher:
    """Says the step's number; one block of two samples for each of two blocks. Fails at step 9."""

    images_per_step = 4

    def __init__(self) -> None:
        self.images_forwarded = 0

    def __call__(self, step: int) -> Bundle:
        if step == 9:
            raise ValueError("no step nine")
        self.images_forwarded += self.images_per_step
        return {
            "ids": np.arange(4) + 10 * step,
            "globals": np.full((2, 4, 3), step) + np.arange(4)[None, :, None],
            "ragged/tokens": np.arange(5.0)[:, None] + step,
            "offsets/tokens": np.array([0, 2, 5]),
            "step/scaling": np.array([float(step)]),
        }


@pytest.fixture(scope="module", autouse=True)
def own_cluster() -> Iterator[None]:
    with cluster.start(Cluster()):
        yield


def start(students: dict[str, int], num_steps: int = 20, window: int = 2) -> Any:
    actor = ray.remote(ShareActor).options(num_cpus=0, max_concurrency=16)
    return actor.remote(CountingTeacher, students, num_steps, window)


def stats(actor: Any) -> Any:
    return ray.get(actor.stats.remote())


def test_all_students_see_the_same_and_the_teacher_works_once() -> None:
    actor = start({"a": 0, "b": 0})
    sources = [SharedBlocks(actor, name, 2) for name in ("a", "b")]
    for step in range(4):
        for index in range(2):
            first, second = [source.load(step, index) for source in sources]
            assert set(first.arrays) == {"globals", "tokens", "scaling"}
            for name, array in first.arrays.items():
                np.testing.assert_array_equal(array, second.arrays[name])
            samples = np.arange(2) + 2 * index
            np.testing.assert_array_equal(first.ids, samples + 10 * step)
            np.testing.assert_array_equal(first.arrays["globals"][1, :, 0], step + samples)
            rows = slice(0, 2) if index == 0 else slice(2, 5)
            np.testing.assert_array_equal(first.arrays["tokens"][:, 0], np.arange(5.0)[rows] + step)
            assert first.arrays["scaling"].tolist() == [step]
            first.arrays["globals"][:] = -1  # a worker may write into its block; others must not see it
    counted = stats(actor)
    assert counted.teacher_forwards_per_image == 1.0
    assert counted.steps_recomputed == 0
    assert counted.bytes_per_image > 0


def test_window_holds_the_fast_student_until_the_slow_one_moves_or_leaves() -> None:
    actor = start({"fast": 0, "slow": 0}, window=2)
    assert ray.get(actor.step.remote("fast", 1))
    ahead = actor.step.remote("fast", 2)
    assert ray.wait([ahead], timeout=1.0)[0] == [], "step 2 is outside the window of a student at 0"
    ray.get(actor.step.remote("slow", 1))
    assert ray.get(ahead, timeout=20)
    further = actor.step.remote("fast", 5)
    assert ray.wait([further], timeout=1.0)[0] == []
    ray.get(actor.leave.remote("slow"))
    assert ray.get(further, timeout=20)


def test_a_student_that_falls_back_gets_old_steps_again() -> None:
    actor = start({"a": 0})
    bundles = [ray.get(ray.get(actor.step.remote("a", step))[0]) for step in (0, 1, 2, 3, 0)]
    np.testing.assert_array_equal(bundles[0]["globals"], bundles[-1]["globals"])
    deadline = time.monotonic() + 20
    while not (counted := stats(actor)).steps_recomputed:
        assert time.monotonic() < deadline
    assert counted.teacher_forwards_per_image > 1.0


def test_a_failing_teacher_fails_its_students_and_says_why() -> None:
    actor = start({"a": 8})
    ray.get(actor.step.remote("a", 8))
    with pytest.raises(RuntimeError, match="no step nine"):
        ray.get(actor.step.remote("a", 9), timeout=20)
