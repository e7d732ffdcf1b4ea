"""What was said once is not computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.storage.local import LocalStore
from orchestrator.teacher_service.cache import CachedTeacher, RepeatingTeacher
from orchestrator.teacher_service.payload import TEACHER, VIEWS, Parts


class Teacher:
    images_per_step = 4

    def __init__(self) -> None:
        self.images_forwarded = 0

    def __call__(self, step: int) -> Parts:
        self.images_forwarded += 4
        outputs = {"ids": np.arange(4), "codes": np.full((2, 4), step, np.float16), "masks": np.eye(4) > 0}
        return {TEACHER: outputs, **Views().parts(step)}


class Views:
    def parts(self, step: int) -> dict[str, dict[str, Any]]:
        return {VIEWS: {"globals": np.full((2, 4, 3), step, np.uint8)}}


def never() -> Teacher:
    raise AssertionError("the real teacher is not needed")


def test_the_second_time_no_teacher_is_made(tmp_path: Path) -> None:
    where = LocalStore(tmp_path), "replay/x/"
    first = CachedTeacher(Teacher, Views, where, 4)
    outputs = [first(step) for step in range(3)]
    assert first.images_forwarded == 12
    second = CachedTeacher(never, Views, where, 4)
    for step, parts in enumerate(outputs):
        again = second(step)
        assert set(again) == {TEACHER, VIEWS}
        for part, outputs in parts.items():
            for name, array in outputs.items():
                np.testing.assert_array_equal(again[part][name], array)
                assert again[part][name].dtype == array.dtype
    assert second.images_forwarded == 0
    with pytest.raises(AssertionError, match="not needed"):
        second(3)


def test_a_damaged_step_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    where = LocalStore(tmp_path), ""
    CachedTeacher(Teacher, Views, where, 4)(0)
    (kept,) = tmp_path.glob("step-*")
    kept.write_bytes(kept.read_bytes()[:20])
    again = CachedTeacher(Teacher, Views, where, 4)
    assert again(0)[TEACHER]["codes"][0, 0] == 0
    assert again.images_forwarded == 4
    assert "damaged" in caplog.text
    assert CachedTeacher(never, Views, where, 4)(0)[VIEWS]["globals"].shape == (2, 4, 3)


def test_a_cache_that_cannot_be_written_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(LocalStore):
        def put_bytes(self, name: str, data: bytes) -> None:
            raise OSError("No space left on device")

    parts = CachedTeacher(Teacher, Views, (Full(tmp_path), ""), 4)(2)
    assert parts[TEACHER]["codes"][0, 0] == 2
    assert "could not be saved" in caplog.text


def test_steps_that_come_again_are_computed_once(tmp_path: Path) -> None:
    def kept() -> CachedTeacher:
        return CachedTeacher(Teacher, Views, (LocalStore(tmp_path), ""), 4)

    teacher = RepeatingTeacher(kept, 3)
    outputs = [teacher(step) for step in range(8)]
    assert [parts[TEACHER]["codes"][0, 0] for parts in outputs] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [parts[VIEWS]["globals"][0, 0, 0] for parts in outputs] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert (teacher.images_forwarded, teacher.images_per_step) == (12, 4)
    assert len(list(tmp_path.glob("step-*"))) == 3
