"""Views of a student's own sizes, views made elsewhere or beforehand: the same boxes of the same photographs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from orchestrator.data.blocks import Block, CropBlocks
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.step_views import StepViews, regenerated_views
from orchestrator.stages.distill.student_config import Student, Views
from orchestrator.stages.distill.task import DistillTask
from orchestrator.stages.distill.teacher_kinds import view_part
from orchestrator.teacher_service.payload import TEACHER, VIEWS, block

from .distilling import CONFIG, RECIPE, frozen_teacher, photographs, tensors_of

OWN = Student(model="vit_femto", views=Views(global_size=64, num_local=1))


def with_own_views(**more: object) -> Distill:
    """A student with larger views beside one without; nothing is distorted, so that views can be compared."""
    plain = {
        "jitter_probability": 0,
        "gray_probability": 0,
        "blur_probability": (0, 0),
        "solarize_probability": 0,
    }
    crops = CONFIG.crops.model_copy(update={**plain, "local_blur_probability": 0})
    return CONFIG.model_copy(
        update={"students": {"small": CONFIG.students["small"], "own": OWN}, "crops": crops, **more}
    )


def test_own_sizes_are_cut_from_the_same_boxes(index: Path, teacher: Path) -> None:
    config = with_own_views()
    sets = {view_part(config, one): config.crops_of(one) for one in config.students.values()}
    assert set(sets) == {"views", "views/64-16-1"}
    parts = frozen_teacher(config, teacher, index, sets)(1)
    small, large = parts["views"], parts["views/64-16-1"]
    assert large["globals"].shape[-2:] == (64, 64)
    assert (small["locals"].shape[0], large["locals"].shape[0]) == (2, 1)
    np.testing.assert_array_equal(small["locals"][:1], large["locals"])
    flat = large["globals"].reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)
    shrunk = np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_AREA) for one in flat])
    other = small["globals"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    gap = np.abs(shrunk.astype(float) - other).mean(axis=(1, 2, 3))
    strangers = np.abs(shrunk.astype(float) - other[::-1]).mean(axis=(1, 2, 3))
    assert gap.max() < 0.3 * strangers.mean(), "the same boxes of the same photographs"


def test_views_of_unlike_sizes_share_boxes_in_jpegs_that_are_decoded_at_unlike_sizes(tmp_path: Path) -> None:
    """And a sibling's views change no pixel of another's."""
    index = photographs(tmp_path, 8, (701, 523), "jpg", seed=2)
    plain = with_own_views()
    large = Student(model="vit_femto", views=Views(global_size=160))
    config = plain.model_copy(update={"students": {"small": CONFIG.students["small"], "own": large}})
    sets = {view_part(config, one): config.crops_of(one) for one in config.students.values()}
    assert config.crops_of(large).min_side > 2 * config.crops.min_side
    parts = StepViews(config, RECIPE, index, 5, sets).parts(0)
    alone = StepViews(plain, RECIPE, index, 5, {VIEWS: plain.crops}).parts(0)
    for name, array in alone[VIEWS].items():
        np.testing.assert_array_equal(parts[VIEWS][name], array)
    small = parts[VIEWS]["globals"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(float)
    flat = parts["views/160-16-2"]["globals"].reshape(-1, 3, 160, 160).transpose(0, 2, 3, 1)
    shrunk = np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_AREA) for one in flat]).astype(float)
    gap = np.abs(shrunk - small).mean(axis=(1, 2, 3))
    strangers = np.abs(shrunk - small[::-1]).mean(axis=(1, 2, 3))
    assert gap.max() < 0.2 * strangers.min()


def test_a_student_with_own_sizes_learns_from_the_teachers_grid(index: Path, teacher: Path) -> None:
    config = with_own_views()
    sets = {view_part(config, OWN): config.crops_of(OWN)}
    parts = frozen_teacher(config, teacher, index, sets)(0)
    assert set(parts) == {TEACHER, "views/64-16-1"}, "views that nobody fetches are not made"
    tensors = tensors_of(parts, 0, 1, (TEACHER, "views/64-16-1"))
    task = DistillTask(config, OWN, RECIPE, teacher, seed=1)
    task.build("cpu")
    losses = task.losses(tensors, task.targets([tensors], lambda tensor: tensor)[0])
    assert losses.total.isfinite()


def test_views_that_were_expected_are_those_that_are_asked_for(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was expected, and in whatever order steps come; nothing is made twice that was expected rightly."""
    config = with_own_views(teacher_threads=3)
    sets = {view_part(config, one): config.crops_of(one) for one in config.students.values()}
    made: list[int] = []
    load = CropBlocks.load

    def counting(self: CropBlocks, step: int, index: int) -> Block:
        made.append(step)
        return load(self, step, index)

    plain = {step: StepViews(config, RECIPE, index, 5, sets).parts(step) for step in (0, 1, 4)}
    monkeypatch.setattr(CropBlocks, "load", counting)
    views = StepViews(config, RECIPE, index, 5, sets)
    for step, expected in ((0, 1), (1, 2), (4, 5), (1, 0), (0, None)):
        blocks, parts = views.blocks(step), views.parts(step)
        if expected is not None:
            views.expect(expected)
        assert [block.step for block in blocks] == [step, step]
        for part, arrays in plain[step].items():
            for name, array in arrays.items():
                np.testing.assert_array_equal(parts[part][name], array)
    # Two blocks of two sets each.
    assert made.count(1) == 2 * 4, "the first time it had been expected, the second time not"
    assert made.count(4) == 4


def test_regenerated_views_are_those_that_would_have_been_shared(index: Path, teacher: Path) -> None:
    config = with_own_views()
    for student in config.students.values():
        crops = config.crops_of(student)
        parts = frozen_teacher(config, teacher, index, {VIEWS: crops})(2)
        own = regenerated_views(config, index, 5, crops).load(2, 1)
        _, shared = block(parts[VIEWS], 1, 2)
        assert set(own.arrays) == {"globals", "locals"}
        for name, array in shared.items():
            np.testing.assert_array_equal(own.arrays[name], array)
