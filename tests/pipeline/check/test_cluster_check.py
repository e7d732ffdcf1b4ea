"""What a cluster that was joined lacks is known before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster, file_visibility
from orchestrator.pipeline.check.pipeline_check import Checked, check_cluster
from orchestrator.pipeline.load import load
from orchestrator.pipeline.store.workspace import Workspace

from .checking import told


def looked_at(
    monkeypatch: pytest.MonkeyPatch, machines: dict[str, str], sees: dict[str, list[str]]
) -> tuple[Checked, dict[str, int]]:
    """What is found at a cluster with such machines, and the files that they were asked for."""
    import ray

    asked: dict[str, int] = {}

    def unseen(files: dict[str, int], nodes: dict[str, str]) -> dict[str, list[str]]:
        asked.update(files)
        return {host: [name for name in files if name not in sees[host]] for host in nodes.values()}

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 2**40, "object_store_memory": 2**40})
    monkeypatch.setattr(file_visibility, "other_machines", lambda: machines)
    monkeypatch.setattr(file_visibility, "unseen", unseen)
    loaded = load("pipeline.yaml")
    Path("runs/pipelines/known").mkdir(parents=True)
    Path("runs/pipelines/known/pipeline.yaml").write_text("a record")
    return check_cluster(loaded, ["pretrain", "gram"], Workspace("runs")), asked


def test_machines_that_see_no_photos_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = looked_at(monkeypatch, {"n": "10.0.0.7"}, {"10.0.0.7": []})
    assert [Path(name).name for name in asked] == ["00.jpg", "06.jpg", "11.jpg", "pipeline.yaml"]
    said = told(found.errors)
    assert "1 of the cluster's 1 other machines cannot read" in said
    assert all(part in said for part in ("00.jpg: 10.0.0.7", "data.photos.path", "  store"))
    assert found.warnings == []


def test_two_nodes_on_one_machine_are_one_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = looked_at(monkeypatch, {"m": "10.0.0.7", "n": "10.0.0.7"}, {"10.0.0.7": []})
    assert found.warnings == [], "no machine is left that could work"
    assert told(found.errors).count("1 of the cluster's 1 other machines cannot read") == 2
    assert len(found.errors) == 2


def test_some_machines_that_see_no_photos_are_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = [
        str(path) for path in (*folder.rglob("*.jpg"), folder / "runs/pipelines/known/pipeline.yaml")
    ]
    sees = {"10.0.0.7": [], "10.0.0.8": everything}
    found, _ = looked_at(monkeypatch, {"m": "10.0.0.7", "n": "10.0.0.8"}, sees)
    assert found.errors == []
    assert told(found.warnings).count("1 of the cluster's 2 other machines cannot read") == 2


def test_a_file_of_another_size_is_not_the_same(folder: Path) -> None:
    files = file_visibility.samples(folder / "photos", ["00.jpg", "01.jpg"])
    assert file_visibility.lacking(files) == []
    (folder / "photos" / "01.jpg").write_bytes(b"another")
    (folder / "photos" / "00.jpg").unlink()
    assert [Path(name).name for name in file_visibility.lacking(files)] == ["00.jpg", "01.jpg"]


@pytest.mark.cluster
def test_a_node_is_asked_by_ray(folder: Path) -> None:
    import ray

    with cluster.start(Cluster()):
        assert file_visibility.other_machines() == {}, "an own cluster is this machine"
        node = {ray.get_runtime_context().get_node_id(): "here", "ab" * 28: "gone"}
        there = str(folder / "photos" / "00.jpg")
        assert file_visibility.unseen({there: 1, str(folder / "none.jpg"): 1}, node) == {
            "here": [str(folder / "none.jpg")]
        }
