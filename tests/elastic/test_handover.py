"""Bytes of checkpoints and artifacts from stage to stage: the real driver, and two plain processes in place of Ray."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from rich.console import Console

from orchestrator.byte_counts import BYTES
from orchestrator.elastic import trainer
from orchestrator.errors import UserError
from orchestrator.fsio import DIGESTS, Digests
from orchestrator.models import build
from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import EVERYTHING, Choice, resolve
from orchestrator.pipeline.run import driver
from orchestrator.stages.common.aligned import load_aligned
from orchestrator.tracking.run import NullRun
from orchestrator.training.job import Job

from .conftest import HEADS, Group

Figures = dict[str, float]
Run = Callable[..., tuple[int, str]]
WORLD = 2
# So that a slice of these small models is more than a part or two.
PART = 64 * 1024
# All that is no weights, whatever the model: manifests, records, the index with its pictures. The larger model's
# backbone alone is twelve times that, and its checkpoint sixty times.
SMALL = 400_000
TRAINED = Choice(only=("curate", "pretrain", "gram"))
WAYS = [f"{what}_bytes_{way}" for what in ("checkpoint", "artifact") for way in ("read", "written")]
# What workers know a store elsewhere by.
_OF_STORES = ("AWS_", "ORCHESTRATOR_CACHE")
SSL = {
    "batch_size": 4,
    "block_size": 2,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 1},
    "optimizer": {"lr": {"peak": 1e-3}},
    "ema": {"peak": 0.9},
}

TEXT = {
    "kind": "align_text",
    "steps": 1,
    "batch_size": 4,
    "block_size": 2,
    "image_size": 32,
    "text": {"dim": 256, "depth": 1, "num_heads": 2},
    "num_blocks": 0,
    "output_dim": 12,
}


class _Runs(NullRun):
    """A run whose children can be looked at by name."""

    def __init__(self, made: dict[str, _Runs]) -> None:
        super().__init__()
        self.made = made

    def child(self, name: str, resume_id: str | None = None) -> _Runs:
        return self.made.setdefault(name, _Runs(self.made))


class Lab:
    """Runs a pipeline of `pretrain`, `gram_anchor` and `align_text`, and keeps what was counted.

    Attributes:
        io: the metrics `io/…` of each stage's newest attempt.
        workers: what each worker counted, by stage.
    """

    def __init__(
        self, group: Group, folder: Path, patch: pytest.MonkeyPatch, store: str | None = None
    ) -> None:
        self._group, self._folder, self._store = group, folder, store or str(folder / "runs")
        self.io: dict[str, Figures] = {}
        self.workers: dict[str, list[dict[str, int]]] = {}
        self.trained: list[str] = []
        patch.setattr(trainer, "run", self._train)

    def run(self, model: str, choice: Choice = EVERYTHING, **gram: Any) -> tuple[int, str]:
        pipeline = {
            "name": "test",
            "store": self._store,
            "data": {"photos": {"path": str(self._folder / "photos"), "captions": "captions.csv"}},
            "elastic": {"device": "cpu", "workers": WORLD, "checkpoint_every_s": 1e9},
            "stages": {
                "curate": {"kind": "curate", "data": "photos", "clusters": 2},
                "pretrain": {
                    **SSL, "kind": "pretrain", "needs": "curate", "model": model, "heads": HEADS, "steps": 2,
                    "snapshot_every": 1,
                },
                "gram": {**SSL, "kind": "gram_anchor", "needs": ["curate", "pretrain"], "steps": 1, **gram},
                "text": {**TEXT, "needs": ["curate", "pretrain"]},
            },
        }  # fmt: skip
        file = self._folder / "pipeline.yaml"
        file.write_text(yaml.safe_dump(pipeline))
        loaded, output = load(file), io.StringIO()
        runs: dict[Any, Any] = {}
        code = driver.execute(
            loaded,
            resolve(loaded),
            Reporter(Console(file=output, width=200), "orchestrator run pipeline.yaml"),
            start_cluster=lambda cluster: nullcontext(),
            open_tracking=lambda *about: _opened(_Runs(runs)),
            choice=choice,
        )
        for name, run in runs.items():
            if history := run.history("io"):
                self.io[name] = history[-1]["metrics"]
        return code, output.getvalue()

    def artifact(self, kind: str) -> Path:
        (found,) = (self._folder / "runs/artifacts").glob(f"{kind}-*")
        return found

    def _train(self, job: Job, *, tracker: Any, stop: Any) -> Figures:
        self.trained.append(job.name)
        sent = base64.b64encode(pickle.dumps(job.for_workers())).decode()
        env = {name: value for name, value in os.environ.items() if name.startswith(_OF_STORES)}
        found = self._group("handed", WORLD, job=sent, part_bytes=PART, env=env)
        self.workers[job.name] = [one["bytes"] for one in found]
        for counted in self.workers[job.name]:
            BYTES.add_workers(counted)
        if "mistake" in found[0]:
            what, where, hint = found[0]["mistake"]
            raise UserError(what, where=where, hint=hint)
        for step, metrics in found[0]["metrics"]:
            tracker.metrics(metrics, step)
        return {}


def _opened(run: _Runs) -> AbstractContextManager[_Runs]:
    return nullcontext(run)


@pytest.fixture
def lab(group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    photographs(tmp_path / "photos")
    return Lab(group, tmp_path, monkeypatch)


def photographs(folder: Path) -> None:
    """Eight pictures with captions."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        pixels = cv2.resize(random.integers(0, 256, (5, 7, 3), dtype=np.uint8), (60, 40))
        cv2.imwrite(str(folder / f"{number}.png"), pixels)
    captions = [f"{number}.png,a picture with the number {number}" for number in range(8)]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *captions]))


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def new_driver(patch: pytest.MonkeyPatch) -> None:
    """Forget what a driver has compared, as a new process would."""
    patch.setattr(DIGESTS, "_known", Digests()._known)


@pytest.mark.parametrize("model", ["vit_femto", "vit_nano"])
def test_weights_go_from_worker_to_worker_once_and_not_through_the_driver(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    assert lab.run(model, Choice(only=("curate", "pretrain")))[0] == 0
    pretrain = lab.artifact("pretrain")
    backbone = sizes(pretrain / "model")
    assert backbone == pytest.approx(4 * sum(one.numel() for one in build(model).parameters()), rel=0.2)

    new_driver(monkeypatch)
    assert lab.run(model, TRAINED, gram={"teacher": "latest"})[0] == 0
    assert lab.trained == ["pretrain", "gram"]
    gram = lab.artifact("gram_anchor")

    checkpoint, export = sizes(pretrain / "checkpoint"), sizes(pretrain / "snapshots") // 2
    for name in ("pretrain", "gram"):
        metrics = lab.io[name]
        for what in WAYS:
            assert metrics[f"driver_{what}"] < SMALL, (name, what)
        totals = {key: sum(one.get(key, 0) for one in lab.workers[name]) for key in lab.workers[name][0]}
        assert {f"worker_{key}": value for key, value in totals.items()}.items() <= metrics.items()

    # Shards and exports are written once each, exports by one worker; the model is made of the last of them.
    first, second = lab.workers["pretrain"]
    shards = [path.stat().st_size for path in sorted((pretrain / "checkpoint").rglob("*.safetensors"))]
    written = shards[0] + 2 * export + backbone
    assert written <= first["checkpoint_bytes_written"] <= written + SMALL
    assert shards[1] <= second["checkpoint_bytes_written"] <= shards[1] + SMALL
    assert second.get("checkpoint_bytes_read", 0) < SMALL

    # Of another stage's checkpoint each worker reads its share.
    snapshot = json.loads((gram / "lineage.json").read_text())["snapshots"][1]["file"]
    assert (gram / snapshot).samefile(pretrain / "snapshots/step-00000002.safetensors")
    assert (gram / "lineage/updates-00000001.safetensors").samefile(
        pretrain / "snapshots/step-00000001.safetensors"
    )
    for rank, counted in enumerate(lab.workers["gram"]):
        # The Gram teacher is whole in each: its backbone is read, and all of its file is compared. Slices begin and
        # end within parts, which are read whole.
        finishing = 2 * backbone if rank == 0 else 0
        own = counted["checkpoint_bytes_read"] - backbone - finishing
        assert checkpoint / WORLD - SMALL <= own <= checkpoint / WORLD + SMALL
        assert counted["artifact_bytes_read"] == export


def test_a_text_model_is_made_by_a_worker_and_its_tower_is_a_link(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab.run("vit_nano", Choice(only=("curate", "pretrain")))[0] == 0
    new_driver(monkeypatch)
    assert lab.run("vit_nano", Choice(only=("text",)))[0] == 0
    tower, text = lab.artifact("pretrain") / "model", lab.artifact("align_text")
    for what in WAYS:
        assert lab.io["text"][f"driver_{what}"] < SMALL, what
    assert (text / "aligned/tower/model.safetensors").samefile(tower / "model.safetensors")
    trained = [text / "aligned" / f"{name}.safetensors" for name in ("aligner", "text")]
    weights, vision = sum(path.stat().st_size for path in trained), sizes(tower)
    assert min(weights, vision) > 4 * SMALL

    first, second = lab.workers["text"]
    shards = [path.stat().st_size for path in sorted((text / "checkpoint").rglob("*.safetensors"))]
    # The export and the model made of it, which is hashed; the tower is in neither.
    assert shards[0] + 2 * weights <= first["checkpoint_bytes_written"] <= shards[0] + 2 * weights + SMALL
    assert 2 * weights <= first["checkpoint_bytes_read"] <= 2 * weights + SMALL
    assert shards[1] <= second["checkpoint_bytes_written"] <= shards[1] + SMALL
    for counted in (first, second):
        assert vision <= counted["artifact_bytes_read"] <= vision + SMALL
    embedded = load_aligned(text / "aligned").embed_texts(["a picture"])
    assert embedded.shape == (1, 12)


def test_a_damaged_tower_is_mended_and_the_text_model_made(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.run("vit_femto", Choice(only=("curate", "pretrain")))[0] == 0
    weights = lab.artifact("pretrain") / "model/model.safetensors"
    data = bytearray(weights.read_bytes())
    whole, data[-9] = bytes(data), data[-9] ^ 1
    weights.write_bytes(data)
    new_driver(monkeypatch)
    lab.trained.clear()
    code, said = lab.run("vit_femto", Choice(last="text"))
    assert code == 0, said
    assert lab.trained == ["text", "pretrain", "text"]
    assert (lab.artifact("align_text") / "aligned/tower/model.safetensors").read_bytes() == whole


def test_damage_that_a_worker_meets_is_mended_and_the_stage_goes_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab.run("vit_femto", TRAINED)[0] == 0
    for shard in (lab.artifact("pretrain") / "checkpoint").rglob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-9] ^= 1
        shard.write_bytes(data)
    new_driver(monkeypatch)
    lab.trained.clear()
    code, said = lab.run("vit_femto", TRAINED, batch_size=2)
    assert code == 0, said
    assert lab.trained == ["gram", "pretrain", "gram"]
    assert "the artifact of pretrain is damaged and is made again" in said


def test_a_count_is_of_one_process_and_told_once() -> None:
    counts = type(BYTES)()
    assert counts.take() == {}
    counts.read("checkpoint", 3)
    counts.written("artifact", 5)
    assert counts.take() == {"checkpoint_bytes_read": 3, "artifact_bytes_written": 5}
    counts.read("checkpoint", 4)
    taken: Mapping[str, int] = counts.take()
    assert taken == {"checkpoint_bytes_read": 4}
    for _ in range(WORLD):
        counts.add_workers(taken)
    metrics = counts.metrics()
    assert len(metrics) == 8
    assert metrics["driver_checkpoint_bytes_read"] == 7
    assert metrics["worker_checkpoint_bytes_read"] == 8
    assert metrics["driver_artifact_bytes_written"] == 5
