"""Several models at once on a Ray cluster: the same figures and files at any number of workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schema import Cluster
from orchestrator.data.index import ImageIndex
from orchestrator.errors import UserError
from orchestrator.stages.base import Context
from orchestrator.stages.evaluate import scoring
from orchestrator.stages.evaluate.candidates import Candidate
from orchestrator.stages.evaluate.measure import Pool
from orchestrator.storage.open import Needed

from .evaluating import artifact, context, make_students, small, stage

__all__ = ["small"]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def written(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.long
@pytest.mark.usefixtures("ray")
def test_figures_and_files_are_the_same_at_any_number_of_workers(small: Context, tmp_path: Path) -> None:
    students = artifact("distill", make_students(tmp_path / "distill"))
    found = {}
    for workers in (1, 2, 4):
        around = context(tmp_path, {**small.inputs, "students": students})
        given = {"models_at_once": workers, "kept_features": 0, "metrics": ["knn", "image_retrieval"]}
        assert stage(**given).uses_ray(Cluster())
        summary = stage(**given).run(around)
        found[workers] = (summary, written(around.out))
    assert found[1] == found[2] == found[4]
    table = json.loads(found[4][1]["table.json"])
    assert [row["name"] for row in table["knn"]["rows"]][-3:] == [
        "pretrain, step 6 (teacher)",
        "student other",
        "student small",
    ]
    assert {"pca_teacher.png", "pca_small.png", "pca_other.png"} <= found[4][1].keys()
    # In the driver's process, too, as far as sums in another order allow.
    alone = context(tmp_path, {**small.inputs, "students": students})
    stage(metrics=["knn", "image_retrieval"]).run(alone)
    plain = json.loads((alone.out / "table.json").read_text())
    for ours, theirs in zip(plain["knn"]["rows"], table["knn"]["rows"], strict=True):
        assert (ours["name"], ours["accuracy"]) == (theirs["name"], pytest.approx(theirs["accuracy"]))
    assert list(plain["metrics"]) == list(table["metrics"])
    # A mistake of a model is told as ever.
    with pytest.raises(UserError, match="does not divide 20 pixels"):
        stage(image_size=20, models_at_once=2).run(replace(small, out=tmp_path))


def test_a_worker_fetches_what_its_machine_may_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[str, ...]] = []
    monkeypatch.setattr(scoring, "fetch", lambda *which: fetched.append(which))
    monkeypatch.setattr(scoring, "score_one", lambda *arguments: scoring.Scored())
    needed = (
        Needed("s3://store", "curate", "a" * 16),
        Needed("s3://store", "pretrain", "b" * 16, ("model",)),
    )
    pool = Pool(ImageIndex([]), [], {}, {})
    work = scoring.Work("evaluate", pool, [], [], 5, 8, 0, 0.0, 1, needed)
    model = Candidate("pretrain", "backbone", lambda: pytest.fail("it is not loaded here"))
    assert scoring._task(work, None, (3, model)) == (3, scoring.Scored(), {})
    assert tuple(fetched) == needed


def test_the_setting_is_no_part_of_the_key() -> None:
    assert stage(models_at_once=4).identity() == stage().identity()
    assert not stage().uses_ray(Cluster())
