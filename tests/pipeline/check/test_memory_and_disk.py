"""What a pipeline takes of disk and memory is compared with what there is, before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.pipeline.cost import memory_and_disk
from orchestrator.pipeline.load import LoadedPipeline, load
from orchestrator.pipeline.plan.stage_plan import EVERYTHING, Choice
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.ssl.pretrain import Pretrain

from .checking import checked, machine, told


def test_a_store_that_is_too_small_for_artifacts_is_an_error_and_a_tight_one_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("pipeline.yaml")
    needs = memory_and_disk.needs(loaded, list(loaded.spec.stages))
    kept = sum(need.artifact for need in needs)
    whole = kept + max(need.work for need in needs)
    machine(monkeypatch, disk=0.99 * kept)
    said = told(checked().errors)
    assert "the stages to run leave about" in said
    assert "the store runs has" in said
    assert 1.01 * kept < 0.95 * whole
    for free in (1.01 * kept, 0.95 * whole, 1.1 * whole):
        machine(monkeypatch, disk=free)
        found = checked()
        assert found.errors == [], "the figures are on the safe side"
        assert "the stages to run take about" in told(found.warnings)
        assert "of the disk" in told(found.warnings)
    machine(monkeypatch, disk=1.3 * whole)
    assert checked().warnings == []


def test_what_an_earlier_attempt_left_is_not_counted_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("pipeline.yaml")
    needs = memory_and_disk.needs(loaded, list(loaded.spec.stages))
    whole = sum(need.artifact for need in needs) + max(need.work for need in needs)
    machine(monkeypatch, disk=0.9 * whole)
    assert "of the disk" in told(checked().warnings)
    stage = next(stage for stage in checked().stages if stage.name == "distill")
    workspace = Workspace("runs")
    piece = workspace.work("student", "ab" * 32)
    piece.mkdir(parents=True)
    workspace.note_piece("distill", stage.key, "small", "student", "ab" * 32)
    with (piece / "shard").open("wb") as file:
        file.truncate(int(0.5 * whole))
    assert checked().warnings == []


@pytest.mark.parametrize(
    ("choice", "stages"),
    [
        (EVERYTHING, []),
        (Choice(force=("curate",)), ["pretrain", "gram", "distill", "align"]),
        (Choice(force=("gram",)), ["gram", "distill", "align"]),
        (Choice(on_code=True), ["pretrain", "gram", "distill", "align"]),
    ],
    ids=["all there", "force", "force in the middle", "other code"],
)
def test_what_is_made_anew_takes_room_and_needs_the_cluster(
    folder: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, choice: Choice, stages: list[str]
) -> None:
    made = SimpleNamespace(digest="d", provenance={"versions": {"torch": "another"}})
    monkeypatch.setattr(Workspace, "find", lambda *_: SimpleNamespace(manifest=made))
    measured: list[str] = []

    def needs(loaded: LoadedPipeline, names: Sequence[str]) -> list[memory_and_disk.Need]:
        measured.extend(names)
        return []

    monkeypatch.setattr(memory_and_disk, "needs", needs)
    said = told(checked(f"cluster.address=127.0.0.1:{closed_port}", choice=choice).errors)
    assert [name for name in measured if name not in ("curate", "evaluate", "publish")] == stages
    assert ("no Ray cluster answers" in said) == bool(stages)


def test_what_is_predicted_is_what_a_run_leaves() -> None:
    """The artifacts of the laptop's pipeline had 49.3 and 74.6 MB (three students, with their stage) in a store."""
    conf = Path(__file__).parents[3] / "conf" / "full_pipeline.yaml"
    loaded = load(conf, needs_data=False)
    pretrain, distill = memory_and_disk.needs(loaded, ["pretrain", "distill"])
    assert pretrain.artifact == pytest.approx(49.3e6, rel=0.15)
    assert distill.artifact == pytest.approx(74.6e6, rel=0.15)
    assert pretrain.work > 3 * 25.4e6, "two checkpoints are kept, and one is written"


def test_a_kind_says_what_it_takes_beside_its_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("pipeline.yaml")
    (plain,) = memory_and_disk.needs(loaded, ["pretrain"])
    monkeypatch.setattr(Pretrain, "kept_bytes", lambda stage, origin: 7.0)
    monkeypatch.setattr(Pretrain, "held_bytes", lambda stage: 5.0)
    (found,) = memory_and_disk.needs(loaded, ["pretrain"])
    assert (found.artifact - plain.artifact, found.shared) == (7.0, 5.0)
    taught, kept = (
        memory_and_disk.needs(load("pipeline.yaml", [f"stages.distill.teacher_cache={one}"]), ["distill"])[0]
        for one in ("false", "true")
    )
    # 20 steps of 4 photos with two crops: a number of 4 bytes for each of the DINO head's 64, and more for iBOT's.
    assert kept.artifact - taught.artifact > 20 * 4 * 2 * 64 * 4


def test_more_memory_than_there_is_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, memory=2**28)
    found = checked("elastic.device=cpu")
    assert found.errors == []
    assert "stage 'distill' takes about" in told(found.warnings)
    assert "this machine has 256.0 MiB" in told(found.warnings)


def test_a_joined_cluster_is_compared_with_what_ray_counts(folder: Path) -> None:
    loaded = load("pipeline.yaml")
    needs = memory_and_disk.needs(loaded, ["distill"])
    little = list(memory_and_disk.of_cluster(loaded, needs, {"memory": 2**28, "object_store_memory": 1.0}))
    assert ["of memory" in str(little[0]), "object store of the cluster" in str(little[1])] == [True, True]
    assert (
        list(memory_and_disk.of_cluster(loaded, needs, {"memory": 2**40, "object_store_memory": 2**40})) == []
    )
    with_gpus = {"memory": 2**28, "object_store_memory": 2**40, "GPU": 8.0}
    assert list(memory_and_disk.of_cluster(loaded, needs, with_gpus)) == [], (
        "networks are in the GPUs' memory"
    )
