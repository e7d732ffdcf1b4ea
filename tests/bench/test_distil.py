"""What `bench/distil` measures with: the foreground's score, and the rule by which a claim holds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, ttest_rel
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import _claims, distil  # noqa: E402
from bench.distil import interval, score, train  # noqa: E402
from bench.learning import measure  # noqa: E402
from bench.learning.measure import Scenes  # noqa: E402
from orchestrator.errors import UserError  # noqa: E402
from orchestrator.models import Backbone, load_pretrained  # noqa: E402


def test_mean_iou_is_that_of_both_classes() -> None:
    """By hand: of four pixels, foreground 1 of 3 and background 1 of 3; all right and all wrong."""
    wanted = np.array([[True, True, False, False]])
    said = np.array([[True, False, True, False]])

    def mean_iou(said: np.ndarray) -> float:
        return interval.value(score.overlaps(said.reshape(1, 2, 2), wanted.reshape(1, 2, 2)))

    assert mean_iou(said) == pytest.approx(1 / 3)
    assert mean_iou(wanted) == 1
    assert mean_iou(~wanted) == 0
    assert mean_iou(np.ones((1, 4), bool)) == pytest.approx(0.5 / 2)


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
    assert interval.value(score.foreground(score.Look(32, colours), *parts)) > 0.9
    assert interval.value(score.foreground(score.Look(32, nothing), *parts)) < 0.5


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

    right = score.probe(bank, named(bank), queries, named(queries))
    assert right.shape == (30,)
    assert right.mean() > 0.85
    other = ["left" if name == "right" else "right" for name in named(queries)]
    assert (score.probe(bank, named(bank), queries, other) == 1 - right).all()


def test_a_gain_must_be_more_than_the_spread_of_either_side() -> None:
    def holds(ours: list[float], theirs: list[float]) -> bool:
        return distil.beats_the_spread(
            "a", *([answers(one) for one in side] for side in (ours, theirs))
        ).holds

    assert holds([0.60, 0.62, 0.61], [0.50, 0.51, 0.52])
    assert not holds([0.60, 0.62, 0.61], [0.50, 0.70, 0.40])
    assert not holds([0.50, 0.62, 0.56], [0.52])
    assert not holds([0.5], [0.5])


def answers(share: float, count: int = 100) -> interval.Asked:
    """The first pictures are right."""
    return (np.arange(count) < round(share * count)).astype(np.float64)


def test_an_interval_is_that_of_paired_pictures() -> None:
    """By scipy: the same pictures are drawn for both sides, so that what both get right adds no doubt."""
    rng = np.random.default_rng(3)
    both = rng.random(200) < 0.5
    first = [np.where(rng.random(200) < 0.1, 1.0, both) for _ in range(3)]
    second = [both.astype(np.float64)]
    wanted = bootstrap(
        (np.mean(first, 0) - second[0],), np.mean, n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    assert interval.over_pictures(first, second) == pytest.approx((wanted.low, wanted.high), abs=0.006)
    assert interval.over_pictures(second, second) == (0, 0)


def test_an_interval_over_scenes_is_of_the_mean_iou_and_not_of_a_mean_of_scenes() -> None:
    """By drawing scenes one by one."""
    rng = np.random.default_rng(4)
    wanted = rng.random((30, 8, 8)) < 0.4
    said = [
        [np.where(rng.random(wanted.shape) < noise, ~wanted, wanted) for _ in range(2)]
        for noise in (0.1, 0.3)
    ]
    ours, theirs = ([score.overlaps(one, wanted) for one in side] for side in said)

    def gain(scenes: np.ndarray) -> float:
        sides = [
            np.mean([interval.value(score.overlaps(one[scenes], wanted[scenes])) for one in side])
            for side in said
        ]
        return float(sides[0] - sides[1])

    drawn = [gain(rng.integers(0, 30, 30)) for _ in range(500)]
    low, high = interval.over_pictures(ours, theirs)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)


def test_an_interval_over_seeds_is_that_of_paired_seeds() -> None:
    ours, theirs = [0.60, 0.66, 0.63], [0.50, 0.57, 0.52]
    wanted = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert interval.over_seeds(ours, theirs) == pytest.approx((wanted.low, wanted.high))
    against_one = ttest_rel(ours, [0.5] * 3).confidence_interval(0.95)
    assert interval.over_seeds(ours, [0.5]) == pytest.approx((against_one.low, against_one.high))
    assert interval.over_seeds([0.6], [0.5]) is None


def test_a_finding_asks_each_student_in_each_way() -> None:
    def ways(*shares: float) -> dict[str, list[interval.Asked]]:
        scenes = [np.tile([[share, 1.0]] * 2, (4, 1, 1)) for share in shares]
        return {way: [answers(share) for share in shares] for way in score.WAYS} | {score.FOREGROUND: scenes}

    scores = {"raw pixels": ways(0.4)} | {teacher: ways(0.9) for teacher in score.TEACHERS}
    for kind in train.MODELS:
        scores |= {f"{kind}, distilled": ways(0.7, 0.71), f"{kind}, from scratch": ways(0.5, 0.51)}
    found = distil.finding(scores, train.QUICK, [1700, 1900])
    assert len(found.questions) == 2 * (2 * len(score.WAYS) + 1) + 1
    failed = [question.claim for question in found.questions if not question.holds]
    assert failed == [
        *(f"foreground mIoU: {kind} distilled has 90% of the better teacher's" for kind in train.MODELS),
        "a seed takes at most 1800 seconds of processor time",
    ]
    assert found.arms["food, k-NN: ViT, distilled"] == [0.7, 0.71]
    record = {**found.as_json(), "date": "2026-01-01", "machine": "two cores", "wall_s": 90}
    assert "| ViT, distilled | 0.705 ± 0.007 |" in _claims.table(record, "for all seeds")


def test_the_plans_are_stages_that_can_be(tmp_path: Path) -> None:
    for plan in (train.FULL, train.QUICK):
        config = train.distill_config(plan)
        for kind, student in config.students.items():
            assert (student.optimizer or config.optimizer).lr.peak == train.RATES[kind]
            scratch = train.scratch_config(kind, plan)
            assert config.crops_of(student).global_size == scratch.crops.global_size == train.SIZES[kind]
            assert (scratch.steps, scratch.model) == (plan.scratch_steps, student.model)
    weights = {train.FOCUS: tmp_path / "focus", train.LITE0: tmp_path / "lite0.pth"}
    assert list(train.objective(weights).teachers) == [train.FOCUS, train.LITE0]


def test_what_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Backbone]:
        made.append(measure.random_net(train.MODELS["ViT"], 0))
        return {"ViT": made[-1]}

    first, again = (train._once(tmp_path / "0-distilled", make) for _ in range(2))
    assert (first, len(made)) == (again, 1)
    assert first.cpu_s > 0
    weights = load_pretrained(first.folders["ViT"]).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in made[0].state_dict().items())


def test_a_folder_has_models_of_one_plan(tmp_path: Path) -> None:
    distil._check_settings(tmp_path, train.settings(train.FULL))
    distil._check_settings(tmp_path, train.settings(train.FULL))
    with pytest.raises(UserError, match="other settings"):
        distil._check_settings(tmp_path, train.settings(train.QUICK))
