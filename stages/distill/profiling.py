"""Costs of a distillation's parts: measured here and kept, or estimated from operations. Imports no torch."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from orchestrator.capacity import measured_costs as profiles
from orchestrator.capacity.allocate import StudentCost, TeacherCost
from orchestrator.capacity.measured_costs import Profile
from orchestrator.config.schema import DataSource
from orchestrator.config.settings import Strict
from orchestrator.errors import UserError
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.common.workload import Workload
from orchestrator.stages.distill.config import Distill
from orchestrator.training.device import assigned_gpus, environment

_MODULE = "orchestrator.stages.distill.measure"
_TIMEOUT_S = 900.0
# Copies that measure at once, so that each has as little of the memory's bandwidth as a worker will.
_MOST_COPIES = 8
_BLOCKS = (1, 2)
# What decides the result, but not what a step costs.
_FREE = (
    "kind", "needs", "students", "steps", "batch_size", "optimizer", "ema", "mix", "homogeneous",
    "homogeneous_ratio", "student_temperature", "teacher_temperature",
)  # fmt: skip
_FREE_OF_STUDENTS = ("optimizer", "ema", "steps", "joins")
# Operational, but they decide what a step costs.
_COSTLY = ("chunk_rows", "activation_checkpointing", "compile", "views")


class Spec(Strict):
    """What one measuring process is told.

    Attributes:
        config: of the stage, as JSON types.
        recipe: of the stage's teacher artifact; None if its teachers come from elsewhere.
        teacher: that artifact; None: made up with random weights.
        index: a folder with a photo index; None: made up.
        sources: where its photographs are.
        blocks: numbers of blocks a step to try.
        rank, world: of the processes that train together; `meeting` is the file where they find each other.
        out: file for the answer.
    """

    config: dict[str, Any]
    recipe: ModelRecipe | None
    teacher: Path | None
    index: Path | None
    sources: dict[str, DataSource] = Field(default_factory=dict)
    with_teacher: bool
    students: tuple[str, ...]
    blocks: tuple[int, ...]
    rank: int
    world: int
    meeting: Path
    out: Path


@dataclass(frozen=True)
class PartCosts:
    """What the parts of a stage cost.

    Attributes:
        source: where that is known from, in words.
        kind: of the devices: `cpu` means cores.
    """

    teacher: TeacherCost
    students: tuple[StudentCost, ...]
    source: str
    kind: str


@dataclass(frozen=True)
class Material:
    """What to measure with: the stage, and the artifacts it will read as far as they are there.

    Attributes:
        recipe: of the teacher that a stage makes; None if all teachers come from elsewhere.
        index_key: of the photographs, if they are real.
        sources: where those are.
        device: an `elastic.device`: `cpu` measures on cores even where there are GPUs.
    """

    stage: Distill
    recipe: ModelRecipe | None
    teacher: Path | None = None
    index: Path | None = None
    index_key: str = ""
    device: str = "auto"
    sources: Mapping[str, DataSource] = field(default_factory=dict)


def measured(
    material: Material, *, refresh: bool = False, say: Callable[[str], None] = lambda line: None
) -> PartCosts:
    """Costs measured on this machine: those that are kept, and the others in about a minute.

    Args:
        material: what to measure.
        refresh: measure also what is kept.
        say: gets a line when a measurement begins, with what it is of and how long it takes.

    Raises:
        UserError: a part cannot be run on this machine.
    """
    stage, machine = material.stage, profiles.hardware(material.device)
    identities = {name: _identity(material, name) for name in ("", *stage.students)}
    found = (
        {} if refresh else {name: profiles.load(machine, identity) for name, identity in identities.items()}
    )
    missing = [name for name in identities if found.get(name) is None]
    if missing:
        parts = ", ".join(name or "the teacher" for name in missing)
        say(f"measuring {parts}: about a minute, and at most {_TIMEOUT_S / 60:.0f} min on a busy machine")
        for name, made in _measure(material, missing, machine, say).items():
            profiles.save(made, identities[name])
            found[name] = made
    known = {name: one for name, one in found.items() if one is not None}
    num_blocks = stage.batch_size // stage.block_size
    students = tuple(
        known[name].student(name, num_blocks, stage.steps_of(own)) for name, own in stage.students.items()
    )
    when = min(one.measured_at for one in known.values())
    device = machine["device"] if machine["device"] != "cpu" else f"a core of {machine['processor']}"
    kind = "cpu" if machine["device"] == "cpu" else "gpu"
    return PartCosts(known[""].teacher(num_blocks), students, f"measured on {device}, {when}", kind)


def estimated(
    works: Sequence[Workload], flops_per_s: float, min_devices: Callable[[Workload], int], source: str
) -> PartCosts:
    """Costs from operations alone, without crops, optimizer and exchange.

    Args:
        works: of a distillation: the teacher's, then the students'.
        flops_per_s: that one device reaches.
        min_devices: devices that a job's memory needs.
        source: for people.
    """
    teacher, *students = works
    devices = min_devices(teacher)
    step_s = teacher.flops_per_image * teacher.batch_size / flops_per_s / devices
    return PartCosts(
        TeacherCost(step_s, devices),
        tuple(
            StudentCost(
                work.name.rpartition("/")[2],
                work.batch_size // work.block_size,
                work.flops_per_image * work.block_size / flops_per_s,
                steps=work.steps,
                min_workers=min_devices(work),
            )
            for work in students
        ),
        source,
        "gpu",
    )


def _identity(material: Material, student: str) -> dict[str, Any]:
    """All that decides what a step of a part costs, save its number of blocks; `""` is the teacher."""
    stage = material.stage
    config = {name: value for name, value in stage.identity().items() if name not in _FREE}
    config |= {name: getattr(stage, name) for name in _COSTLY}
    recipe = material.recipe.model_dump(mode="json") if material.recipe is not None else None
    # Weights as files are not part of an identity; another file is another network.
    files = {
        field: [[str(path), path.stat().st_size] for path in paths] for field, paths in stage.files().items()
    }
    identity = {"config": config, "recipe": recipe, "files": files, "format": 2}
    if not student:
        sets = {stage.crops_of(one).model_dump_json() for one in stage.students.values()}
        return {**identity, "part": "teacher", "photos": material.index_key, "views": sorted(sets)}
    own = stage.students[student]
    costly = {name: value for name, value in own.identity().items() if name not in _FREE_OF_STUDENTS}
    return {**identity, "part": "student", "student": {**costly, "zero_stage": own.zero_stage}}


def _measure(
    material: Material, missing: Sequence[str], machine: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Profile]:
    students = tuple(name for name in missing if name)
    gpu = machine["device"] != "cpu"
    with tempfile.TemporaryDirectory(prefix="orchestrator-profile-") as folder:
        here = Path(folder)
        copies = 1 if gpu else min(machine["cores"], _MOST_COPIES)
        alone = [
            _spec(material, here / f"alone-{copy}", students, _BLOCKS, with_teacher="" in missing)
            for copy in range(copies)
        ]
        answers = _run(alone, gpu)
        steps = {
            name: [statistics.median(answer[name][str(blocks)] for answer in answers) for blocks in _BLOCKS]
            for name in missing
        }
        pair: dict[str, dict[str, float]] = {}
        if students and machine["devices"] >= 2:
            both = [
                _spec(material, here / "pair", students, _BLOCKS[1:], rank=rank, world=2) for rank in range(2)
            ]
            say("measuring what two workers of a student exchange: about as long again")
            pair = _run(both, gpu)[0]
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = {}
    for name, (one, two) in steps.items():
        fixed_s, block_s = profiles.fit(one, two)
        exchange_s = max(0.0, pair[name]["2"] - fixed_s - block_s) if name in pair else 0.0
        made[name] = Profile(
            fixed_s=fixed_s, block_s=block_s, exchange_s=exchange_s, measured_at=now, hardware=dict(machine)
        )
    return made


def _spec(
    material: Material,
    place: Path,
    students: tuple[str, ...],
    blocks: tuple[int, ...],
    *,
    with_teacher: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Spec:
    return Spec(
        # A default that is spelt out is refused where it makes no sense to set it.
        config=material.stage.model_dump(mode="json", exclude_unset=True),
        recipe=material.recipe,
        teacher=material.teacher,
        index=material.index,
        sources=dict(material.sources),
        with_teacher=with_teacher,
        students=students,
        blocks=blocks,
        rank=rank,
        world=world,
        meeting=place.with_suffix(".meeting"),
        out=place.with_suffix(f".{rank}.json"),
    )


def _run(specs: Sequence[Spec], gpu: bool) -> list[dict[str, dict[str, float]]]:
    """The answers of processes that measure at once."""
    command = [sys.executable, "-m", _MODULE]
    gpus = assigned_gpus() if gpu else ()
    running: list[subprocess.Popen[str]] = []
    try:
        for spec in specs:
            # Each process has the GPU of its rank to itself.
            env = {**os.environ, **environment(gpus[spec.rank : spec.rank + 1])}
            log = spec.out.with_suffix(".log").open("w")
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, env=env
            )
            running.append(process)
            assert process.stdin is not None
            process.stdin.write(spec.model_dump_json())
            process.stdin.close()
        for spec, process in zip(specs, running, strict=True):
            if process.wait(_TIMEOUT_S):
                raise _failed(spec, f"exit code {process.returncode}")
    except subprocess.TimeoutExpired:
        raise _failed(specs[0], f"not done after {_TIMEOUT_S:.0f} s") from None
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [json.loads(spec.out.read_text()) for spec in specs]


def _failed(spec: Spec, how: str) -> UserError:
    lines = spec.out.with_suffix(".log").read_text().strip().splitlines()
    return UserError(
        f"a step could not be measured on this machine: {lines[-1] if lines else how}",
        where=how,
        hint="add a `hardware` section for the machines of the pipeline: costs are then estimated, not measured",
    )
