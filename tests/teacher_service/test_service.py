"""The hand-out of a teacher's steps: the real actor, the real object store."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from orchestrator.data.blocks import Block
from orchestrator.teacher_service.actor_client import NAMESPACE
from orchestrator.teacher_service.service import TeacherService
from orchestrator.teacher_service.shared_blocks import SharedBlocks

from .lab import PATIENCE_S, Lab, entries, eventually, keep


def later(what: Callable[[], Any]) -> Future[Any]:
    """The result of `what`, in a thread that holds up nobody's end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(what())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def source(service: TeacherService, student: str) -> SharedBlocks:
    return service.source(student)()


def expect(block: Block, step: int, index: int) -> None:
    """A block as `CountingTeacher` means it."""
    samples = np.arange(2) + 2 * index
    np.testing.assert_array_equal(block.ids, samples + 10 * step)
    assert set(block.arrays) == {"globals", "tokens", "scaling", "bulk"}
    np.testing.assert_array_equal(block.arrays["globals"][1, :, 0], step + samples)
    rows = slice(0, 2) if index == 0 else slice(2, 5)
    np.testing.assert_array_equal(block.arrays["tokens"][:, 0], np.arange(5.0)[rows] + step)
    assert block.arrays["scaling"].tolist() == [step]
    assert block.arrays["bulk"].shape == (1, 2, 100_000)


def test_all_students_see_the_same_and_the_teacher_works_once(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 0, "b": 0}) as service:
        sources = [source(service, name) for name in ("a", "b")]
        for step in range(4):
            for index in range(2):
                first, second = (blocks.load(step, index) for blocks in sources)
                expect(first, step, index)
                with pytest.raises(ValueError, match="read-only"):
                    first.arrays["globals"][:] = -1  # others read the same memory
                expect(second, step, index)
    stats = service.account.stats()
    assert stats.teacher_forwards_per_image == 1.0
    assert (stats.steps_recomputed, stats.teacher_restarts) == (0, 0)
    assert stats.bytes_per_image > 400_000
    assert max(Counter(step for _, step in entries(tmp_path / "diary")).values()) == 1


def test_window_holds_the_fast_student_until_the_slow_one_moves_or_leaves(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"fast": 0, "slow": 0}, window=2) as service:
        fast, slow = source(service, "fast"), source(service, "slow")
        fast.load(1, 0)
        ahead = later(lambda: fast.load(2, 0))
        time.sleep(3.0)  # longer than one call waits in the actor
        assert not ahead.done(), "step 2 is outside the window of a student at 0"
        slow.load(1, 0)
        expect(ahead.result(PATIENCE_S), 2, 0)
        further = later(lambda: fast.load(5, 1))
        time.sleep(1.0)
        assert not further.done()
        service.deregister("slow")
        expect(further.result(PATIENCE_S), 5, 1)
        with pytest.raises(RuntimeError, match="slow is not one of the students any more"):
            slow.load(2, 0)


def test_a_student_that_falls_back_gets_old_steps_again(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 0}) as service:
        blocks = source(service, "a")
        for step in (0, 1, 2, 3, 4, 0, 1, 2):
            expect(blocks.load(step, 1), step, 1)
    stats = service.account.stats()
    assert stats.steps_recomputed >= 1
    assert stats.teacher_forwards_per_image > 1.0


def test_two_blocks_at_once_cost_one_question(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 0}, step_s=0.5) as service:
        blocks = source(service, "a")
        asked = []
        ask = blocks._next_step

        def counting(step: int, lost: str | None) -> Any:
            asked.append(step)
            return ask(step, lost)

        blocks._next_step = counting  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            for step in range(3):
                both = list(pool.map(blocks.load, (step, step), (0, 1)))
                for index in range(2):
                    expect(both[index], step, index)
        assert asked == [0, 1, 2]


def test_workers_of_many_students_wait_at_once(lab: Lab, tmp_path: Path) -> None:
    """Far more callers than threads of any pool; the one that they all wait for still gets through."""
    crowd = [f"s{number}" for number in range(60)]
    with keep(tmp_path, dict.fromkeys([*crowd, "slow"], 0), window=2) as service:
        actor = eventually(lambda: find(service))
        waiting = [actor.step.remote(name, 2) for name in crowd]
        slow = source(service, "slow")
        began = time.monotonic()
        slow.load(1, 0)
        answers = ray.get([*waiting, *[actor.step.remote(name, 2) for name in crowd]], timeout=PATIENCE_S)
        assert all("there" in answer for answer in answers[60:])
        assert time.monotonic() - began < PATIENCE_S


def find(service: TeacherService) -> Any:
    try:
        return ray.get_actor(service.name, NAMESPACE)
    except ValueError:
        return None


def test_a_failing_teacher_says_why_and_tries_again_when_asked(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 8, "b": 8}, bad_step=9) as service:
        blocks = source(service, "a")
        expect(blocks.load(8, 0), 8, 0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the teacher failed at step 9: ValueError: no step 9"):
                blocks.load(9, 0)
        time.sleep(2.0)
        tries = Counter(step for _, step in entries(tmp_path / "diary"))
        assert tries[9] <= 4, "it must not try for ever while nobody asks"
        (tmp_path / "diary.fixed").touch()
        expect(blocks.load(9, 0), 9, 0)


def test_a_step_whose_object_is_lost_is_computed_again(lab: Lab, tmp_path: Path) -> None:
    """Such as one that was spilled to a disk that failed: the actor lives and does not know."""
    with keep(tmp_path, {"a": 0}) as service:
        blocks = source(service, "a")
        get, asked = blocks._client.get, []

        def failing(ref: Any, limit_s: float) -> Any:
            value = get(ref, limit_s)
            if "bulk" not in value:
                return value
            asked.append(ref.hex())
            if ref.hex() == asked[0]:
                raise ray.exceptions.ObjectLostError(ref.hex(), "", "")
            return value

        blocks._client.get = failing  # type: ignore[method-assign]
        expect(blocks.load(1, 0), 1, 0)
        assert len(set(asked)) == 2, "another object than the one that was lost"
    assert service.account.steps_recomputed == 1


def test_a_closed_source_waits_no_longer(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 0, "slow": 0}, window=2) as service:
        blocks = source(service, "a")
        held = later(lambda: blocks.load(2, 0))
        time.sleep(1.0)
        blocks.close()
        with pytest.raises(RuntimeError, match="closed"):
            held.result(5.0)


def test_a_service_that_never_comes_is_an_error_after_a_while(lab: Lab) -> None:
    blocks = SharedBlocks("share-of-nobody", "a", 2, patience_s=1.0)
    with pytest.raises(
        RuntimeError, match=r"step 3 is not available: the teacher service has not been reachable for . s"
    ):
        later(lambda: blocks.load(3, 0)).result(PATIENCE_S)
