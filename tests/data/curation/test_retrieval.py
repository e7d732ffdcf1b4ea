"""Retrieval finds what comparing every seed with every picture finds, and training draws it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image
from sklearn.neighbors import NearestNeighbors

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import DataSource
from orchestrator.data.curation import retrieval
from orchestrator.data.curation.block_workers import ThreadWorkers
from orchestrator.data.curation.descriptor import describe
from orchestrator.data.curation.mix import sample_order
from orchestrator.data.curation.retrieval import nearest_of_pool
from orchestrator.data.curation.vectors import ArrayVectors, open_vectors
from orchestrator.data.index import ImageIndex
from orchestrator.stages.base import Context
from orchestrator.stages.curate.config import Curate
from orchestrator.tracking.run import NullRun


def _crops(name: str, side: int) -> list[NDArray[np.uint8]]:
    """Crops of a real photograph, next to each other."""
    photo = load_sample_image(name)
    tops, lefts = range(0, photo.shape[0] - 64, side), range(0, photo.shape[1] - 64, side)
    return [np.ascontiguousarray(photo[top : top + 64, left : left + 64]) for top in tops for left in lefts]


@pytest.mark.parametrize("in_file", [False, True])
def test_it_is_what_brute_force_finds(in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of real photos, in blocks and passes of other sizes; the pool and the seeds in any place."""
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(retrieval, "_LEAST_ROWS", 23)
    monkeypatch.setattr(retrieval, "_TILE", 7)
    monkeypatch.setattr(retrieval, "_PASS", 20)
    vectors_ND = np.stack(
        [describe(crop) for name in ("china.jpg", "flower.jpg") for crop in _crops(name, 48)]
    )
    order = np.random.default_rng(0).permutation(len(vectors_ND))
    seeds, pool = order[:50], np.sort(order[50:])
    np.save(tmp_path / "vectors.npy", vectors_ND)
    vectors = open_vectors(tmp_path / "vectors.npy") if in_file else ArrayVectors(vectors_ND)
    found = nearest_of_pool(vectors, seeds, pool, 5, ThreadWorkers(2))
    exact_ND = vectors_ND.astype(np.float64)
    brute = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(exact_ND[pool])
    wanted_SK = pool[brute.kneighbors(exact_ND[seeds], return_distance=False)]
    assert np.array_equal(found, wanted_SK)
    assert np.array_equal(found, nearest_of_pool(vectors, seeds, pool, 5, ThreadWorkers(1)))


def test_of_a_small_pool_all_are_near() -> None:
    vectors = ArrayVectors(np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    found = nearest_of_pool(vectors, np.array([0, 1]), np.arange(2, 9), 50)
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(2, 9), (2, 1)))


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A few photos of a flower as seeds, and a heap with other photos of flowers and of a temple."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    flower, china = _crops("flower.jpg", 90), _crops("china.jpg", 90)
    for folder, crops in (("few", flower[::4]), ("web", [*flower[1::4], *flower[2::4], *china])):
        (tmp_path / folder).mkdir()
        for number, crop in enumerate(crops):
            Image.fromarray(crop).save(tmp_path / folder / f"{number:03}.png")
    (tmp_path / "out").mkdir()
    return Context(
        name="curate", pipeline="test", seed=0, key="k", inputs={}, keys={},
        sources={name: DataSource(path=tmp_path / name) for name in ("few", "web")},
        out=tmp_path / "out", work=tmp_path / "work", elastic=Elastic(), run=NullRun(),
    )  # fmt: skip


def _stage(**more: object) -> Curate:
    fields = {"data": ["few", "web"], "clusters": 4, "sample": 0.2, "near_duplicate": 0}
    return Curate(kind="curate", **fields, **more)  # type: ignore[arg-type]


def test_what_is_retrieved_is_a_component_that_training_draws(context: Context, tmp_path: Path) -> None:
    stage = _stage(retrieve={"seeds": "few", "per_seed": 3}, holdout=0.1)
    stage.run(context)
    index = ImageIndex.load(context.out)
    vectors_ND = np.load(context.out / "embeddings.npy").astype(np.float64)
    held_out = set(index.rows_of("held_out").tolist())
    seeds = [row for row in index.rows_from("few").tolist() if row not in held_out]
    pool = np.array([row for row in index.rows_from("web").tolist() if row not in held_out])
    near_SP = np.argsort(((vectors_ND[seeds][:, None] - vectors_ND[pool][None]) ** 2).sum(-1), axis=1)
    wanted = set(pool[near_SP[:, :3]].ravel().tolist())
    retrieved, balanced = set(index.rows_of("retrieved").tolist()), set(index.rows_of("balanced").tolist())
    assert retrieved == wanted
    assert retrieved & balanced, "the test has no photo that is both"
    assert index.components == ["balanced", "held_out", "pool", "retrieved"]
    assert stage.made_components() == ("balanced", "pool", "retrieved")
    (told,) = json.loads((context.out / "report.json").read_text())["retrieved"]
    assert told == {"seeds": "few", "per_seed": 3, "of": len(seeds), "photos": len(wanted)}

    order = sample_order(index, {"retrieved": 1.0}, batch_size=len(wanted), seed=0)
    assert set(order.ids(0).tolist()) == wanted
    both = sample_order(index, None, batch_size=1, seed=0)
    assert set(both.rows.tolist()) == retrieved | balanced
    weighted = sample_order(index, {"retrieved": 0.5, "balanced": 0.25, "few": 0.25}, batch_size=40, seed=0)
    drawn = np.isin(weighted.ids(3), sorted(wanted - balanced))
    assert 0 < drawn.sum() <= 20

    plain = replace(context, out=tmp_path / "plain")
    plain.out.mkdir()
    _stage(holdout=0.1).run(plain)
    same = ImageIndex.load(plain.out)
    assert same.rows_of("balanced").tolist() == sorted(balanced), "retrieval changes no sample"
    assert "retrieved" not in same.components


@pytest.mark.parametrize(
    ("retrieve", "said"),
    [
        ({"seeds": "feww"}, "'feww' is not among `data`; did you mean 'few'"),
        ([{"seeds": "few"}, {"seeds": "few"}], "is given twice"),
        ([{"seeds": "few"}, {"seeds": "web"}], "nothing to retrieve from"),
        ({"seeds": "few", "per_seed": 0}, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told(retrieve: object, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        _stage(retrieve=retrieve)
