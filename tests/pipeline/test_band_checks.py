"""Pictures of unlike numbers of bands in one run are a mistake before anything runs, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from orchestrator.errors import UserError
from orchestrator.pipeline import dag
from orchestrator.pipeline.check.band_checks import pixel_errors
from orchestrator.pipeline.load import load

TRAIN: dict[str, Any] = {
    "steps": 2, "batch_size": 4, "block_size": 2, "optimizer": {"lr": {"peak": 1e-3}},
    "crops": {"global_size": 32, "local_size": 16, "num_local": 1},
}  # fmt: skip
SIX, FOUR = {"bands": [0, 1, 2, 3, 4, 5], "range": [0, 4095]}, {"bands": [0, 1, 2, 3], "range": [0, 4095]}


def errors_of(folder: Path, data: dict[str, Any], stages: dict[str, Any]) -> list[UserError]:
    sources = {}
    for name, pixels in data.items():
        (folder / name).mkdir()
        sources[name] = {"path": name, **({"pixels": pixels} if pixels else {})}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"name": "bands", "data": sources, "stages": stages}))
    loaded = load(path)
    assert not loaded.mistakes, loaded.mistakes
    return list(pixel_errors(loaded, dag.roles(loaded)))


def pipeline(**distill: Any) -> dict[str, Any]:
    """Two curated datasets: a backbone of the first one, and students of the second."""
    return {
        "first": {"kind": "curate", "data": "first", "clusters": 2},
        "second": {"kind": "curate", "data": "second", "clusters": 2},
        "pretrain": {"kind": "pretrain", "needs": "first", "model": "vit_femto", **TRAIN},
        "distill": {
            "kind": "distill", "needs": ["second", "pretrain"], "students": {"a": {"model": "vit_femto"}},
            **TRAIN, **distill,
        },
    }  # fmt: skip


def test_datasets_of_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = {"curate": {"kind": "curate", "data": ["six", "four"], "clusters": 2}}

    (error,) = errors_of(tmp_path, {"six": SIX, "four": FOUR}, stages)

    assert "differ in the number of bands of `pixels`" in error.what


def test_a_model_that_is_taken_to_other_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = pipeline()
    stages["gram"] = {"kind": "gram_anchor", "needs": ["second", "pretrain"], **TRAIN}
    del stages["distill"]

    (error,) = errors_of(tmp_path, {"first": None, "second": SIX}, stages)

    assert "'gram' reads pictures of 6 channels, and the model of stage 'pretrain' takes 3" in error.what
    assert "stages.gram.needs" in str(error.where)


@pytest.mark.parametrize(
    ("bands", "said"),
    [
        (None, "the teacher takes 3 channels, and would see 6"),
        ([0, 1], "would see 2"),
        ([7, 1, 0], "band 7 is not among"),
        ([2, 1, 0], None),
    ],
)
def test_a_teacher_of_photos_sees_the_bands_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bands: list[int] | None, said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {} if bands is None else {"teacher_bands": bands}

    found = errors_of(tmp_path, {"first": None, "second": SIX}, pipeline(**named))

    assert len(found) == (said is not None)
    assert all(
        said in error.what and "stages.distill.teacher_bands" in str(error.where) for error in found if said
    )


@pytest.mark.parametrize("pixels", [SIX, None])
def test_metrics_with_photos_of_their_own_are_of_models_of_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: dict[str, Any] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    plane = tmp_path / "pairs/plane"
    plane.mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (16, 16)).save(plane / f"{number}.ppm")
    (plane / "H_1_2").write_text("1 0 0\n0 1 0\n0 0 1\n")
    metric = {"use": "correspondence", "data": {"path": "pairs"}}
    stages = {
        "curate": {"kind": "curate", "data": "first", "clusters": 2},
        "pretrain": {"kind": "pretrain", "needs": "curate", "model": "vit_femto", **TRAIN},
        "evaluate": {
            "kind": "evaluate",
            "needs": ["curate", "pretrain"],
            "metrics": ["image_retrieval", metric],
        },
    }

    found = errors_of(tmp_path, {"first": pixels}, stages)

    assert [error.what for error in found] == (
        ["correspondence reads photos of 3 channels, and the models of stage 'evaluate' take 6"]
        if pixels
        else []
    )
    assert all("stages.evaluate.metrics.1" in str(error.where) for error in found)
