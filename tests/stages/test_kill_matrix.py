"""Who can be killed in a distillation, what stops then, and whether anybody's model is another one for it.

Real raylets, teachers and students on real photographs; each row of the table is a run of two students with two
teachers in which somebody is killed midway. A student that is not the victim must end with the weights that it has
when it is trained alone and undisturbed, and so must the victim, unless its own mistake stopped it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from orchestrator.config.elastic import Elastic
from orchestrator.config.schedules import Optimizer, Schedule
from orchestrator.config.schema import Cluster
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.samples import fetch_food
from orchestrator.elastic import cluster
from orchestrator.elastic.controller_host import hosts
from orchestrator.stages.base import Context
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.common.nets import HeadedBackbone
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.student_config import Student
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.teacher_service.counters import TeacherCounters
from orchestrator.tracking.run import NullRun
from tools.market import SpotMarket

STEPS, AT = 40, 12
PATIENCE_S = 240.0
WEIGHTS = 1e-5
HEADS = Heads(hidden=64, dino_bottleneck=16, dino_prototypes=128, ibot_bottleneck=16, ibot_prototypes=128)
RECIPE = ModelRecipe(model="vit_femto", drop_path=0.0, heads=HEADS, global_size=64)
STUDENTS = {"vit": Student(model="vit_femto"), "cnn": Student(model="convnext_mini")}
CONFIG = Distill.model_validate(
    {
        "kind": "distill", "students": {"vit": {"model": "vit_femto"}}, "steps": STEPS, "batch_size": 16,
        "block_size": 8, "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 5}}, "teachers": 2,
        "crops": {"global_size": 64, "local_size": 32, "num_local": 2},
    }
)  # fmt: skip


class Watched(NullRun):
    """A stage's run that can be asked how far its students are."""

    def __init__(self) -> None:
        super().__init__()
        self.children: dict[str, NullRun] = {}

    def child(self, name: str, resume_id: str | None = None) -> NullRun:
        self.children[name.rpartition("/")[2]] = run = NullRun()
        return run

    def step(self) -> int:
        """Of the slowest student."""
        steps = [max((int(r["step"]) for r in run.history()), default=0) for run in self.children.values()]
        return min(steps, default=0)


@dataclass
class Scene:
    """The market, the photographs and the teacher."""

    market: SpotMarket
    folder: Path
    index: Path
    teacher: Path
    num_runs: int = 0

    def run(self, students: dict[str, Student], strike: Callable[[Scene], None] | None = None) -> Ended:
        """Train students; when the slowest is at step `AT`, `strike`."""
        self.num_runs += 1
        folder = self.folder / f"run-{self.num_runs}"
        (folder / "out").mkdir(parents=True)
        context = Context(
            name="distill", pipeline="p", seed=0, key=folder.name, keys={}, sources={}, out=folder / "out",
            work=folder / "work",
            inputs={"index": artifact("curate", self.index), "teacher": artifact("pretrain", self.teacher)},
            elastic=Elastic(workers=1, checkpoint_every_s=1.0, max_failures=0, heartbeat_timeout_s=5.0), run=Watched(),
        )  # fmt: skip
        config = CONFIG.model_copy(update={"students": students})
        errors: list[BaseException] = []

        def train() -> None:
            try:
                config.run(context)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=train)
        thread.start()
        if strike is not None:
            wait(lambda: context.run.step() >= AT or not thread.is_alive())  # type: ignore[attr-defined]
            strike(self)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        return Ended(context, errors[0] if errors else None, folder)


@dataclass
class Ended:
    """What a run left."""

    context: Context
    error: BaseException | None
    folder: Path

    def weights(self, student: str) -> dict[str, torch.Tensor] | None:
        """Of the backbone, if the student finished."""
        for path in self.folder.glob("work/parts/*/done"):
            if json.loads((path / "recipe.json").read_text())["model"] == STUDENTS[student].model:
                return load_file(path / "model" / "model.safetensors")
        return None

    def restarts(self, student: str) -> int:
        """How often the student's group was started again."""
        for path in self.folder.glob("work/parts/*/done/figures.json"):
            if json.loads((path.parent / "recipe.json").read_text())["model"] == STUDENTS[student].model:
                return int(json.loads(path.read_text())["restarts"])
        return 0

    def account(self) -> TeacherCounters:
        return TeacherCounters.load(self.context.work / "sharing.json")


def artifact(kind: str, path: Path) -> Artifact:
    manifest = Manifest(kind=kind, key="f" * 64, created="", files={}, provenance={}, summary={})
    return Artifact("f" * 64, kind, path, manifest)


def wait(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def actors(name: str) -> list[psutil.Process]:
    """Ray's processes of an actor class, below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(f"ray::{name}" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(*processes: psutil.Process) -> None:
    assert processes
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


def worker_of(scene: Scene, student: str) -> psutil.Process:
    """The training process of a student."""
    slot = next(slot["pid"] for slot in hosts.slots() if slot["job"] == f"distill/{student}")
    return next(p for p in scene.market.workers() if any(above.pid == slot for above in p.parents()))


def slot_of(scene: Scene, student: str) -> psutil.Process:
    worker = worker_of(scene, student)
    return next(above for above in worker.parents() if "ray::WorkerSlot" in " ".join(above.cmdline()))


def machine_of(scene: Scene, process: psutil.Process) -> str:
    above = {one.pid for one in process.parents()}
    for name, node in scene.market.machines.items():
        if node.all_processes["raylet"][0].process.pid in above:
            return name
    raise AssertionError("on no machine")


def kill_machine(scene: Scene, process: psutil.Process) -> None:
    name = machine_of(scene, process)
    scene.market.kill(name)
    scene.market.add(f"{name}+")


HOPELESS = {"cnn": STUDENTS["cnn"].model_copy(update={"optimizer": Optimizer(lr=Schedule(peak=1e30))})}
CASES: dict[str, Callable[[Scene], None] | None] = {
    "nobody": lambda scene: None,
    "one of two teachers": lambda scene: kill(actors("TeacherActor")[0]),
    "both teachers at once": lambda scene: kill(*actors("TeacherActor")),
    "the coordinator": lambda scene: kill(*actors("StepCoordinator")),
    "the coordinator and both teachers": lambda scene: kill(
        *actors("StepCoordinator"), *actors("TeacherActor")
    ),
    "a student's worker": lambda scene: kill(worker_of(scene, "cnn")),
    "a student's slot": lambda scene: kill(slot_of(scene, "cnn")),
    "a student's machine": lambda scene: kill_machine(scene, worker_of(scene, "cnn")),
    "a teacher's machine": lambda scene: kill_machine(scene, actors("TeacherActor")[0]),
    "a student whose loss is not finite": None,
}


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    gaps = [
        float((ours[name] - value).norm() / value.norm().clamp_min(1e-12)) for name, value in theirs.items()
    ]
    return max(gaps)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whoever_is_killed_the_students_are_those_trained_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "food"
    fetch_food(photos)
    rows = []
    for path in sorted(photos.rglob("*.jpeg"))[:200]:
        with Image.open(path) as image:
            rows.append(ImageRecord("food", path.name, str(photos), path.name, *image.size))
    (tmp_path / "index").mkdir()
    ImageIndex(rows).save(tmp_path / "index")
    torch.manual_seed(3)
    (tmp_path / "teacher" / "snapshots").mkdir(parents=True)
    net = HeadedBackbone("vit_femto", 0.0, HEADS)
    save_file(net.state_dict(), tmp_path / "teacher" / "snapshots" / "step-00000001.safetensors")
    (tmp_path / "teacher" / "recipe.json").write_text(RECIPE.model_dump_json())
    lines = [
        "| killed | teachers lost | coordinators lost | steps recomputed | restarts of vit, cnn | weights of vit "
        "| of cnn |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    wrong = []
    with SpotMarket(slots=2) as market:
        for name in ("one", "two", "three"):
            market.add(name)
        with cluster.start(Cluster(address=market.address), Distill.preload):
            scene = Scene(market, tmp_path, tmp_path / "index", tmp_path / "teacher")
            alone = {}
            for name, student in STUDENTS.items():
                ended = scene.run({name: student})
                assert ended.error is None, ended.error
                alone[name] = ended.weights(name)
            for case, strike in CASES.items():
                students = STUDENTS if strike is not None else STUDENTS | HOPELESS
                ended = scene.run(students, strike)
                account = ended.account()
                cells = []
                for name, reference in alone.items():
                    assert reference is not None
                    own = ended.weights(name)
                    if own is None:
                        cells.append("stopped, with its reason")
                        if strike is not None or name == "vit" or "not finite" not in str(ended.error):
                            wrong.append(f"{case}: {name} did not finish: {ended.error}")
                        continue
                    gap = relative(own, reference)
                    cells.append("identical" if gap == 0 else f"within {gap:.0e}")
                    if not gap <= WEIGHTS:
                        wrong.append(f"{case}: {name} differs by {gap:.1e}")
                restarts = ", ".join(str(ended.restarts(name)) for name in alone)
                counts = (account.restarts, account.coordinator_restarts, account.steps_recomputed)
                lines.append(
                    f"| {case} | {' | '.join(map(str, counts))} | {restarts} | {' | '.join(cells)} |"
                )
                if account.images_per_step * STEPS > account.images_forwarded:
                    wrong.append(f"{case}: fewer forwards than images")
                with capsys.disabled():
                    sys.stdout.write(f"{lines[-1]}\n")
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))
    assert not wrong, wrong
