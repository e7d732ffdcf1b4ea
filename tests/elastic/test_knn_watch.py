"""k-NN that is watched while training: what it is, the same at any number of workers, and when training stops."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.decode import read_square
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.models import build, normalise
from orchestrator.stages.ssl.probe_photos import ProbePhotos, accuracy, probe_rows

from .conftest import RunJob
from .test_chunks import saved
from .test_continue import RunStage, hub, run_stage

__all__ = ["hub", "run_stage"]

STEPS, SIDE, K = 3, 32, 3
CONFIG: dict[str, Any] = {
    "steps": STEPS, "frozen_prototype_steps": 0, "homogeneous": None, "homogeneous_ratio": None, "mix": None,
    "knn": {"every": 2, "photos": 40, "k": K},
}  # fmt: skip
LABELS = ("bowls", "cups", "plates")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 noisy pictures of three kinds that differ in their colour a little; the last six are odd ones."""
    root, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(3)
    rows = []
    for number in range(36):
        kind = number % 3
        coarse = rng.integers(0, 150, (6, 8, 3), dtype=np.uint8)
        coarse[..., kind] += 80
        pixels = cv2.resize(coarse, (52, 40), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / f"{number:02}.png"), pixels)
        label = LABELS[kind] if number < 30 else f"only {number}"
        rows.append(ImageRecord("photos", f"{number:02}.png", str(root), f"{number}", 52, 40, label=label))
    folder = tmp_path_factory.mktemp("labelled")
    ImageIndex(rows).save(folder)
    return folder


def without_labels(index: Path, folder: Path) -> Path:
    folder.mkdir()
    whole = ImageIndex.load(index)
    ImageIndex([replace(whole[row], label=None) for row in range(len(whole))]).save(folder)
    return folder


def naive(features: np.ndarray[Any, Any], labels: list[str], k: int) -> float:
    """Leave-one-out, written from its definition."""
    rows = features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    right = 0
    for at, row in enumerate(rows):
        near = sorted(
            ((float(row @ other), labels[i]) for i, other in enumerate(rows) if i != at), reverse=True
        )[:k]
        votes = Counter(label for _, label in near)
        best = max(votes, key=lambda label: (votes[label], sum(like for like, one in near if one == label)))
        right += best == labels[at]
    return right / len(rows)


def seen(paths: list[Path], weights: dict[str, Any]) -> np.ndarray[Any, Any]:
    tower = build("vit_femto").eval()
    tower.load_state_dict(
        {name: torch.from_numpy(weights[f"ema/backbone.{name}"]).view(value.shape)
         for name, value in tower.state_dict().items()}
    )  # fmt: skip
    photos = [
        np.asarray(ImageOps.fit(Image.open(path), (SIDE, SIDE), Image.Resampling.BICUBIC)) for path in paths
    ]
    pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return tower(normalise(pixels)).cls.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_it_is_the_emas_and_the_same_at_any_number_of_workers(
    run_job: RunJob, labelled: Path, tmp_path: Path, zero_stage: int
) -> None:
    """Three blocks of photos: one worker has all, and four have more places than there are blocks."""
    common = {"index": labelled, "zero_stage": zero_stage, "exact": True}
    alone = run_job(tmp_path / "alone", 1, config=CONFIG, **common)
    assert list(alone["held_out"]) == [0, 2, 3], "before the first step, every second one, and after the last"
    metrics = {step: found["knn"] for step, found in alone["held_out"].items()}
    world = 4 if zero_stage else 2
    others = run_job(tmp_path / "others", world, config=CONFIG, **common)
    assert {step: found["knn"] for step, found in others["held_out"].items()} == metrics
    index = ImageIndex.load(labelled)
    weights = saved(tmp_path / "alone" / f"checkpoints/step-{STEPS:08d}")
    features = seen([index.path(row) for row in range(30)], weights)
    assert metrics[STEPS] == naive(features, [str(index[row].label) for row in range(30)], K)
    if zero_stage:
        return
    # Nobody's weights are touched by it.
    plain = run_job(tmp_path / "plain", 1, config={**CONFIG, "knn": None}, **common)
    assert plain["losses"] == alone["losses"]
    assert plain["held_out"] == {}


def test_without_labels_two_parts_of_a_photo_are_to_find_each_other(
    run_job: RunJob, labelled: Path, tmp_path: Path
) -> None:
    index = without_labels(labelled, tmp_path / "plain")
    found = run_job(tmp_path / "job", 2, config={**CONFIG, "steps": 2}, index=index)["held_out"]
    photos = ProbePhotos(ImageIndex.load(index), 40, SIDE)
    arrays = [photos.load(0, at).arrays for at in range(photos.num_blocks)]
    parts = np.concatenate([one["photos"] for one in arrays])
    assert parts.shape == (36, 2, 3, SIDE, SIDE)
    # They overlap in a quarter: the lower right one of the first is the upper left one of the second.
    np.testing.assert_array_equal(parts[:, 0, :, 16:, 16:], parts[:, 1, :, :16, :16])
    tower = build("vit_femto").eval()
    weights = saved(tmp_path / "job/checkpoints/step-00000002")
    tower.load_state_dict(
        {name: torch.from_numpy(weights[f"ema/backbone.{name}"]).view(value.shape)
         for name, value in tower.state_dict().items()}
    )  # fmt: skip
    with torch.no_grad():
        cls = tower(normalise(torch.from_numpy(parts).flatten(0, 1))).cls.numpy()
    wanted = naive(cls, [str(row) for row in range(36) for _ in range(2)], 1)
    assert found[2]["same_photo"] == wanted
    assert "knn" not in found[2]


def test_which_photos_are_watched(labelled: Path) -> None:
    index = ImageIndex.load(labelled)
    rows, labels = probe_rows(index, 1000)
    assert rows == list(range(30)), "a label of one photo can only be missed"
    assert labels == [index[row].label for row in rows]
    few, _ = probe_rows(index, 12)
    assert set(few) < set(rows)
    assert len(few) <= 12
    # The same files in another order are the same choice.
    order = [*range(35, -1, -1)]
    turned, _ = probe_rows(ImageIndex([index[row] for row in order]), 12)
    assert {order[row] for row in turned} == set(few)
    # Enough held-out ones with labels are taken, too few are not.
    rng = np.random.default_rng(0)
    many = [
        replace(index[row % 30], sha256=f"{row}", component="held_out" if row % 2 else "balanced")
        for row in rng.permutation(200).tolist()
    ]
    held, _ = probe_rows(ImageIndex(many), 1000)
    assert len(held) == 100
    assert all(many[row].component == "held_out" for row in held)
    some, _ = probe_rows(ImageIndex(many[:60]), 1000)
    assert {many[row].component for row in some} == {"held_out", "balanced"}
    bare, none = probe_rows(ImageIndex([replace(row, label=None) for row in many]), 70)
    assert (len(bare), none) == (70, [])


def test_a_photo_that_cannot_be_read_is_told_and_left_out(labelled: Path) -> None:
    whole = ImageIndex.load(labelled)
    lost = 4
    index = ImageIndex(
        [replace(whole[row], path="gone.png") if row == lost else whole[row] for row in range(len(whole))]
    )
    photos = ProbePhotos(index, 40, SIDE)
    labels = np.concatenate([photos.load(0, at).arrays["labels"] for at in range(photos.num_blocks)])
    (told,) = photos.pop_troubles()
    assert "gone.png" in told
    assert photos.pop_troubles() == []
    assert np.flatnonzero(labels < 0).tolist() == [lost]
    features = np.random.default_rng(1).normal(size=(30, 1, 5))
    kept = labels >= 0
    wanted = naive(features[kept][:, 0], [str(one) for one in labels[kept]], K)
    assert accuracy(features, labels, K) == {"knn": wanted}
    features[0] = np.nan
    assert accuracy(features, labels, K) == {"knn": 0.0}


def test_training_stops_when_it_falls_and_goes_on_when_it_does_not(
    run_stage: RunStage, hub: Path, labelled: Path, tmp_path: Path
) -> None:
    common = {
        "from": str(hub), "steps": 8, "knn": {"every": 2, "k": K}, "ema": {"peak": 0.0},
        "stop_if": {"cosine_rise": None, "locality_drop": None, "knn_drop": 0.15},
    }  # fmt: skip
    wild = run_stage("wild", {**common, "optimizer": {"lr": {"peak": 0.3}}}, index=labelled)
    assert "since k-NN is worse than at the start: knn fell from" in wild["error"]
    assert "stop_if.knn_drop" in wild["error"]
    assert "lower optimizer.lr.peak" in wild["error"]
    assert len(wild["history"]) < 8
    assert wild["held_out"][0]["step"] == 0
    calm = run_stage("calm", {**common, "optimizer": {"lr": {"peak": 1e-6}}}, index=labelled)
    assert "error" not in calm
    assert [look["step"] for look in calm["held_out"]] == [0, 2, 4, 6, 8]


def test_photos_are_seen_as_in_training(tmp_path: Path) -> None:
    """Values beyond 8 bits, by the range of their dataset: else k-NN is of other pixels than the model learns."""
    rng, rows = np.random.default_rng(0), []
    for number in range(8):
        values = rng.integers(0, 1024, (SIDE, SIDE), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
        name, label = f"{number}.png", str(number % 2)
        rows.append(ImageRecord("deep", name, str(tmp_path), f"{number:064x}", SIDE, SIDE, label=label))
    for white in (255, 1023):
        pixels = PixelFormat(range=(0, white))
        photos = ProbePhotos(ImageIndex(rows, {"deep": pixels}), 40, SIDE)
        seen = photos.load(0, 0).arrays["photos"]
        for place, row in enumerate(photos.rows):
            wanted = read_square(tmp_path / f"{row}.png", SIDE, pixels=pixels)
            np.testing.assert_array_equal(seen[place, 0].transpose(1, 2, 0), wanted)
        assert seen.dtype == (np.uint16 if white > 255 else np.uint8)
        assert seen.max() > 0.9 * np.iinfo(seen.dtype).max
