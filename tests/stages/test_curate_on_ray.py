"""Curation on a Ray cluster gives what threads of one process give, and goes on where it was cut off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Cluster, DataSource
from orchestrator.elastic import cluster
from orchestrator.errors import Stopped, UserError
from orchestrator.models import from_config, preset, save_pretrained
from orchestrator.stages.base import Context
from orchestrator.stages.common.network_source import NetworkSource
from orchestrator.stages.curate import embed, embed_on_ray
from orchestrator.stages.curate.config import Curate
from orchestrator.tracking.run import NullRun

# float32 of vectors of length 1.
BOUND = 1e-6


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with cluster.start(Cluster()):
        yield


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """22 different pictures, and one that cannot be read when it is embedded."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(22):
        small = rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((60, 40)).save(folder / f"{number:02}.png")
    return folder


def _context(tmp_path: Path, photos: Path, name: str) -> Context:
    (tmp_path / name / "out").mkdir(parents=True)
    return Context(
        name="curate", pipeline="test", seed=0, key="k", inputs={}, keys={},
        sources={"photos": DataSource(path=photos)}, out=tmp_path / name / "out", work=tmp_path / "work" / name,
        elastic=Elastic(device="cpu"), run=NullRun(),
    )  # fmt: skip


@pytest.mark.usefixtures("ray")
def test_the_cluster_gives_what_threads_give(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_BLOCK", 5)
    torch.manual_seed(0)
    save_pretrained(tmp_path / "model", from_config(preset("vit_femto")).state_dict(), "vit_femto")
    network = {"from": str(tmp_path / "model"), "size": 32}

    def stage(workers: str) -> Curate:
        fields = {"clusters": [6, 2], "resampling": 1, "embedding": network, "near_duplicate": 0}
        return Curate(kind="curate", data="photos", workers=workers, **fields)  # type: ignore[arg-type]

    plain = embed.embed_photos

    def lose_one(*args: object, **kwargs: object) -> list[int]:
        (photos / "07.png").rename(tmp_path / "07.png")
        try:
            return plain(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            (tmp_path / "07.png").rename(photos / "07.png")

    monkeypatch.setattr(embed, "embed_photos", lose_one)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    here = _context(tmp_path, photos, "threads")
    stage("threads").run(here)

    # Another cache: nothing of what is known helps. The first run on the cluster is stopped after a block.
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another"))
    stop = threading.Event()
    asked: list[int] = []
    blocks = embed_on_ray.embed_blocks

    def stop_after_one(some: list[tuple[int, object]], *args: object) -> Iterator[object]:
        asked.append(len(some))
        for number, block in enumerate(blocks(some, *args)):  # type: ignore[arg-type]
            yield block
            if number == 0 and len(asked) == 1:
                stop.set()

    monkeypatch.setattr(embed_on_ray, "embed_blocks", stop_after_one)
    there = _context(tmp_path, photos, "ray")
    with pytest.raises(Stopped):
        stage("ray").run(replace(there, stop=stop))
    stop.clear()
    summary = stage("ray").run(there)
    assert asked[0] == 5
    assert 1 <= asked[1] < 5
    assert (summary["unique"], summary["corrupt"]) == (21, 1)
    found, wanted = (np.load(one.out / "embeddings.npy") for one in (there, here))
    assert np.abs(found - wanted).max() <= BOUND
    for name in ("index.parquet", "levels.npy"):
        assert (there.out / name).read_bytes() == (here.out / name).read_bytes(), name


def test_where_all_is_known_the_cluster_is_asked_nothing() -> None:
    source = NetworkSource.model_validate({"timm": "any"})
    assert list(embed_on_ray.embed_blocks([], source, 32, "here", "cpu", None, 2)) == []


@pytest.mark.parametrize("lost", [[0, 1], [4, 5], [0, 1, 2, 3, 4, 5]])
def test_blocks_of_photos_that_all_went_have_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: list[int]
) -> None:
    """Of such a block the cluster's answer does not tell the length of vectors."""
    monkeypatch.setattr(embed, "_BLOCK", 2)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    photos = [embed.PhotoFile(tmp_path / f"{number}.png", f"{number:064x}", 10**6) for number in range(6)]

    def answers(blocks: list[tuple[int, list[embed.PhotoFile]]], *_: object) -> Iterator[object]:
        for number, block in blocks:
            there = [int(photo.path.stem) not in lost for photo in block]
            rows = [[float(photo.path.stem), 1.0, 2.0] for photo in block]
            vectors = np.array(rows, np.float32) if all(there) else np.empty((0, 0), np.float32)
            yield number, there, vectors

    monkeypatch.setattr(embed_on_ray, "embed_blocks", answers)
    source, target = NetworkSource.model_validate({"timm": "any"}), tmp_path / "embeddings.npy"

    def embedded() -> list[int]:
        work = tmp_path / "work"
        return embed.embed_photos(photos, source, 32, work, target, where="here", identity="x", actors=1)

    if len(lost) == len(photos):
        with pytest.raises(UserError, match="none of the photos can be read any more"):
            embedded()
        return
    assert embedded() == lost
    found = np.load(target)
    assert found[:, 0].tolist() == [number for number in range(6) if number not in lost]
    assert found.shape == (4, 3)


def test_a_cluster_that_was_joined_is_used_and_an_own_one_is_not() -> None:
    joined, own = Cluster(address="auto"), Cluster()
    used = {
        workers: [Curate(kind="curate", data="x", workers=workers).uses_ray(one) for one in (joined, own)]  # type: ignore[arg-type]
        for workers in ("auto", "threads", "ray")
    }
    assert used == {"auto": [True, False], "threads": [False, False], "ray": [True, True]}
