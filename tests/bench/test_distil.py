"""What `bench/distil` measures with: the foreground's score, and the rule by which a claim holds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import distil  # noqa: E402
from bench.distil import score, train  # noqa: E402
from bench.learning.measure import Scenes  # noqa: E402


def test_mean_iou_is_that_of_both_classes() -> None:
    """By hand: of four pixels, foreground 1 of 3 and background 1 of 3; all right and all wrong."""
    wanted = np.array([[True, True, False, False]])
    said = np.array([[True, False, True, False]])
    assert score.mean_iou(said, wanted) == pytest.approx(1 / 3)
    assert score.mean_iou(wanted, wanted) == 1
    assert score.mean_iou(~wanted, wanted) == 0
    assert score.mean_iou(np.ones((1, 4), bool), wanted) == pytest.approx(0.5 / 2)


def scenes(count: int, seed: int) -> Scenes:
    """Red squares on blue, in the cells of a grid of four."""
    rng = np.random.default_rng(seed)
    masks = np.kron(rng.random((count, 4, 4)) < 0.4, np.ones((8, 8))) > 0
    red, blue = np.array([220, 30, 30]), np.array([30, 30, 220])
    images = np.where(masks[..., None], red, blue) + rng.integers(-20, 20, (count, 32, 32, 3))
    return Scenes(images.astype(np.uint8).transpose(0, 3, 1, 2), masks)


def test_the_foreground_is_told_by_what_patches_say() -> None:
    def colours(images: Tensor) -> tuple[Tensor, Tensor]:
        cells = torch.nn.functional.avg_pool2d(images.float(), 4).flatten(2).transpose(1, 2)
        return cells.mean(1), cells

    def nothing(images: Tensor) -> tuple[Tensor, Tensor]:
        cells = colours(images)[1]
        return cells[:, 0], torch.zeros_like(cells)

    parts = scenes(20, 0), scenes(10, 1)
    # Maps are blown up from the cells, so that edges are soft.
    assert score.foreground(score.Look(32, colours), *parts) > 0.9
    assert score.foreground(score.Look(32, nothing), *parts) < 0.5


def test_features_are_of_the_size_that_a_model_takes() -> None:
    seen = []

    def see(images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(images.shape))
        return torch.zeros(len(images), 2), torch.zeros(len(images), 4, 2)

    found = score.Look(8, see)(np.zeros((40, 3, 16, 16), np.uint8))
    assert seen == [(32, 3, 8, 8), (8, 3, 8, 8)]
    assert (found.cls.shape, found.patches.shape) == ((40, 2), (40, 4, 2))
    assert [part.shape[1] for part in score.of_pixels()(np.zeros((2, 3, 64, 64), np.uint8))] == [3072, 64]


def test_a_probe_learns_from_training_pictures_alone() -> None:
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(60, 5)).astype(np.float32)
    queries = rng.normal(size=(30, 5)).astype(np.float32)

    def named(rows: np.ndarray) -> list[str]:
        return ["right" if row[0] > 0 else "left" for row in rows]

    assert score.probe(bank, named(bank), queries, named(queries)) > 0.85
    other = ["left" if name == "right" else "right" for name in named(queries)]
    assert score.probe(bank, named(bank), queries, other) < 0.15


def test_a_gain_must_be_more_than_the_spread_of_either_side() -> None:
    assert distil.beats_the_spread("a", [0.60, 0.62, 0.61], [0.50, 0.51, 0.52]).holds
    assert not distil.beats_the_spread("a", [0.60, 0.62, 0.61], [0.50, 0.70, 0.40]).holds
    assert not distil.beats_the_spread("a", [0.50, 0.62, 0.56], [0.52]).holds
    assert not distil.beats_the_spread("a", [0.5], [0.5]).holds


def test_a_finding_asks_each_student_in_each_way() -> None:
    def ways(value: float) -> dict[str, list[float]]:
        return {way: [value, value + 0.01] for way in (*score.WAYS, score.FOREGROUND)}

    scores = {"raw pixels": {way: [0.4] for way in (*score.WAYS, score.FOREGROUND)}}
    scores |= {teacher: {way: [0.9] for way in (*score.WAYS, score.FOREGROUND)} for teacher in score.TEACHERS}
    for kind in train.MODELS:
        scores |= {f"{kind}, distilled": ways(0.7), f"{kind}, from scratch": ways(0.5)}
    found = distil.finding(scores, train.QUICK)
    assert len(found.questions) == 2 * (2 * len(score.WAYS) + 1)
    failed = [question.claim for question in found.questions if not question.holds]
    assert failed == [
        f"foreground mIoU: {kind} distilled has 90% of the better teacher's" for kind in train.MODELS
    ]
    assert found.arms["food, k-NN: ViT, distilled"] == [0.7, 0.71]
    assert "| ViT, distilled | 0.705 ± 0.007 |" in distil.table(scores)


def test_the_plans_are_stages_that_can_be(tmp_path: Path) -> None:
    for plan in (train.FULL, train.QUICK):
        config = train.distill_config(plan)
        assert {config.crops_of(student).global_size for student in config.students.values()} == {train.SIZE}
        for model in train.MODELS.values():
            assert train.scratch_config(model, plan).steps == plan.scratch_steps
    weights = {train.FOCUS: tmp_path / "focus", train.LITE0: tmp_path / "lite0.pth"}
    assert list(train.objective(weights).teachers) == [train.FOCUS, train.LITE0]
