"""What batches are made of: homogeneous ones, and one triple of sizes a step."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import stats

from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.stages.common.crops import crop_blocks
from orchestrator.stages.ssl.high_res import HighRes
from orchestrator.stages.ssl.pretrain import Pretrain

from .small import BASE, PAPER, RECIPE


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 30 photos, twelve of them of the source of homogeneous batches, which nobody else draws."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(30):
        cv2.imwrite(str(root / f"{number:02}.png"), rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        source, component = ("fine", "pool") if number < 12 else ("photos", "balanced")
        if number >= 20:
            component = "seeds"
        rows.append(ImageRecord(source, f"{number:02}.png", str(root), "", 32, 24, component=component))
    folder = tmp_path_factory.mktemp("index")
    ImageIndex(rows).save(folder)
    return folder


def test_a_tenth_of_the_batches_is_of_one_source(photos: Path) -> None:
    """By default, from config to pixels: one step of any ten, all its blocks; the others never touch it."""
    config = Pretrain.model_validate(
        {**BASE, "model": "vit_femto", "kind": "pretrain", "needs": "x", "homogeneous": "fine"}
        | {"crops": {"global_size": 8, "local_size": 8, "num_local": 0}}
    )
    source = crop_blocks(config, RECIPE, photos, 3)
    index = ImageIndex.load(photos)
    special = set(index.rows_from("fine").tolist())
    kinds, seen = [], Counter[int]()
    for step in range(40):
        ids = [int(row) for block in range(source.num_blocks) for row in source.load(step, block).ids]
        assert len(ids) == 8
        inside = {row in special for row in ids}
        assert len(inside) == 1, "no batch mixes the two"
        kinds.append(inside.pop())
        seen.update(ids)
    assert all(sum(kinds[start : start + 10]) == 1 for start in range(31))
    assert set(seen) >= set(range(12, 30)), "the mixed batches show all that was chosen"
    assert sum(seen[row] for row in special) == 4 * 8


def test_blocks_are_made_of_photos_that_were_moved(photos: Path, tmp_path: Path) -> None:
    config = Pretrain.model_validate(
        {**BASE, "model": "vit_femto", "kind": "pretrain", "needs": "x"}
        | {"crops": {"global_size": 8, "local_size": 8, "num_local": 0}}
    )
    before = crop_blocks(config, RECIPE, photos, 3).load(0, 0)
    there = Path(ImageIndex.load(photos)[0].root)
    shutil.copytree(there, tmp_path / "new")
    shutil.copytree(photos, tmp_path / "index")
    index = ImageIndex.load(photos)
    rows = [replace(index[row], root="/nowhere") for row in range(len(index))]
    ImageIndex(rows).save(tmp_path / "index")
    after = crop_blocks(config, RECIPE, tmp_path / "index", 3, roots={"photos": str(tmp_path / "new")}).load(
        0, 0
    )
    assert (before.ids == after.ids).all()
    for name, array in before.arrays.items():
        assert (after.arrays[name] == array).all()


TRIPLES = [
    (64, 16, 96, 0.3),
    (96, 16, 144, 0.3),
    (96, 24, 144, 0.3),
    (96, 32, 144, 0.05),
    (96, 48, 144, 0.05),
]


def high_res() -> HighRes:
    """The paper's mix of sizes at an eighth of the pixels."""
    resolutions = [
        {"global_size": big, "local_size": small, "gram_size": gram, "p": p}
        for big, small, gram, p in TRIPLES
    ]
    return HighRes.model_validate({**BASE, "kind": "high_res", "needs": "x", "resolutions": resolutions})


def sizes(config: HighRes, step: int, seed: int) -> tuple[int, int, int | None]:
    crops = config.crops_at(step, seed)
    return crops.global_size, crops.local_size, crops.gram_size


def test_size_triples_come_with_their_probabilities() -> None:
    config, num_steps = high_res(), 4000
    counts = Counter(sizes(config, step, 11) for step in range(num_steps))
    assert set(counts) == {triple[:3] for triple in TRIPLES}
    observed = [counts[triple[:3]] for triple in TRIPLES]
    assert stats.chisquare(observed, [triple[3] * num_steps for triple in TRIPLES]).pvalue > 1e-4
    # Steps are independent: what comes after a triple does not depend on it.
    drawn = [sizes(config, step, 11) for step in range(num_steps)]
    repeats = np.mean([a == b for a, b in itertools.pairwise(drawn)])
    assert repeats == pytest.approx(sum(triple[3] ** 2 for triple in TRIPLES), abs=0.03)


def test_size_triples_are_those_of_the_paper() -> None:
    """Locals of 160 px for 168, which the patch does not divide."""
    mix = [
        (r["global_size"], r["local_size"], r["gram_size"], r["p"]) for r in PAPER["high_res"]["resolutions"]
    ]
    paper = [(512, 112, 768, 0.3), (768, 112, 1152, 0.3), (768, 160, 1152, 0.3)]
    assert mix == [*paper, (768, 224, 1152, 0.05), (768, 336, 1152, 0.05)]


def test_one_size_triple_a_step_the_same_for_every_worker_and_after_a_resume(photos: Path) -> None:
    config, seed = high_res(), 11
    steps = next(
        range(first, first + 3)
        for first in range(100)
        if len({sizes(config, step, seed) for step in range(first, first + 3)}) == 3
    )
    worker, other, resumed = (crop_blocks(high_res(), RECIPE, photos, seed) for _ in range(3))
    for step in steps:
        shapes = {name: array.shape for name, array in worker.load(step, 0).arrays.items()}
        big, small, gram = sizes(config, step, seed)
        assert shapes == {
            "globals": (2, 4, 3, big, big),
            "locals": (2, 4, 3, small, small),
            "gram": (2, 4, 3, gram, gram),
            "masks": (2, 4, (big // 8) ** 2),
        }
        assert {name: array.shape for name, array in other.load(step, 1).arrays.items()} == shapes
    again = resumed.load(steps[-1], 0).arrays
    assert all(np.array_equal(array, again[name]) for name, array in worker.load(steps[-1], 0).arrays.items())
