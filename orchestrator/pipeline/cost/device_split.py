"""How a number of devices is best split between the teacher and the students of each distillation of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.text import Text

from orchestrator.capacity.allocate import Phase, device_hours, schedule, separate_hours
from orchestrator.config.schema import Hardware
from orchestrator.errors import UserError
from orchestrator.pipeline import dag
from orchestrator.pipeline.cost.costing import costing, zero_stage
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan import crop_checks
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.common.workload import Workload
from orchestrator.stages.compute_cost import workloads
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.profiling import Material, PartCosts, estimated, measured
from orchestrator.table import stage_table

if TYPE_CHECKING:
    from orchestrator.storage.artifacts import Artifact

# Nobody asks for more; a job that needs more than that for its memory is a mistake in the file.
_MOST_DEVICES = 8192


@dataclass(frozen=True)
class StageSplit:
    """One distillation on stated devices.

    Attributes:
        phases: a new split each time that a student has done its steps; most stages have one.
        hours, separate: device-hours, and those of separate runs that never wait.
    """

    name: str
    costs: PartCosts
    phases: tuple[Phase, ...]
    hours: float
    separate: float


def splits(
    loaded: LoadedPipeline, devices: float, *, refresh: bool, say: Callable[[str], None]
) -> list[StageSplit]:
    """The split of every distillation of a pipeline, in running order.

    Costs are measured on this machine, unless the file has a `hardware` section for another one: then they are
    estimated from operations.

    Args:
        devices: accelerators, or cores.
        refresh: measure anew what is kept.
        say: gets a line when a measurement begins.

    Raises:
        UserError: no stage distils, too few devices, or a step cannot be measured here.
    """
    roles = dag.roles(loaded)
    crop_checks.check(loaded, roles)
    names = [name for name in dag.order(loaded) if isinstance(loaded.spec.stages[name], Distill)]
    if not names:
        raise UserError(
            "no stage of this pipeline distils, so there is nothing to split", where=str(loaded.path)
        )
    hardware = loaded.spec.hardware
    here = hardware is None or _is_here(hardware)
    found = []
    for name in names:
        say_stage = _prefixed(name, say)
        costs = (
            measured(material(loaded, name), refresh=refresh, say=say_stage)
            if here or hardware is None
            else _estimated(loaded, name, hardware)
        )
        found.append(_split(loaded, name, costs, devices))
    return found


def print_splits(console: Console, found: Sequence[StageSplit]) -> None:
    """A table and three lines for each stage."""
    for number, item in enumerate(found):
        if number:
            console.print()
        first, *later = item.phases
        kind = "cores" if item.costs.kind == "cpu" else "devices"
        console.print(Text(f"{item.name} on {first.split.devices:g} {kind}", style="bold"))
        table = stage_table("part", f"s on one {kind[:-1]}", kind, "s a step", "busy")
        for part, alone_s, number_of, own_s, busy in _rows(item):
            table.add_row(part, f"{alone_s:.4g}", f"{number_of:g}", f"{own_s:.4g}", f"{busy:.0%}")
        console.print(table)
        console.print(Text(_verdict(item, kind)), soft_wrap=True)
        for phase in later:
            names = ", ".join(f"{name} {number}" for name, number in phase.split.workers.items())
            line = f"then, for {phase.steps:,} steps: teacher {phase.split.teachers}, {names}; "
            console.print(Text(f"{line}{phase.split.step_s:.4g} s a step"), soft_wrap=True)
        console.print(Text(item.costs.source, style="bright_black"), soft_wrap=True)


def as_dict(found: Sequence[StageSplit]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "stages": [
            {
                "name": item.name,
                "costs": item.costs.source,
                "device_hours": item.hours,
                "device_hours_separate": item.separate,
                "phases": [_phase(item, phase) for phase in item.phases],
            }
            for item in found
        ]
    }


def _phase(item: StageSplit, phase: Phase) -> dict[str, Any]:
    split = phase.split
    alone = {"teacher": item.costs.teacher.work_s} | {one.name: one.work_s for one in item.costs.students}
    return {
        "steps": phase.steps,
        "devices": split.devices,
        "leftover": split.leftover,
        "shared": split.shared,
        "step_s": split.step_s,
        "bound_s": split.bound_s,
        "eta": split.eta,
        "teachers": split.teachers,
        "workers": dict(split.workers),
        "own_step_s": dict(split.own_s),
        "work_s": {name: alone[name] for name in split.own_s},
    }


def _rows(item: StageSplit) -> list[tuple[str, float, float, float, float]]:
    """Part, seconds on one device, devices, seconds a step, share of the time that it works."""
    split, teacher = item.phases[0].split, item.costs.teacher
    number = split.teachers * teacher.devices
    rows = [("teacher", teacher.work_s, float(number), split.own_s["teacher"])]
    rows += [
        (one.name, one.work_s, float(split.workers[one.name]), split.own_s[one.name])
        for one in item.costs.students
    ]
    return [(*row, row[3] / split.step_s) for row in rows]


def _verdict(item: StageSplit, kind: str) -> str:
    split = item.phases[0].split
    hours = "core-hours" if kind == "cores" else "GPU-hours"
    saved = item.separate - item.hours
    against = "less than" if saved >= 0 else "more than the bound of"
    left = f"; {split.leftover:g} {kind} are left over" if split.leftover else ""
    shared = f"; processes share the {kind}" if split.shared else ""
    return (
        f"{split.step_s:.4g} s a step, η {split.eta:.3f}{left}{shared}\n"
        f"{_hours(item.hours)} {hours}, {_hours(abs(saved))} {against} separate runs ({_hours(item.separate)})"
    )


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _split(loaded: LoadedPipeline, name: str, costs: PartCosts, devices: float) -> StageSplit:
    from orchestrator.capacity.measured_costs import cores

    # Cores of one machine can be shared by processes; those of many, and GPUs, are given to one each.
    share = costs.kind == "cpu" and devices <= cores()
    try:
        phases = schedule(costs.teacher, costs.students, devices, share=share)
    except UserError as error:
        where = loaded.where("stages", name, "students")
        raise UserError(f"{error.what} ({error.where})", where=where, hint=error.hint) from None
    hours, separate = device_hours(phases), separate_hours(costs.teacher, costs.students)
    return StageSplit(name, costs, tuple(phases), hours, separate)


def material(loaded: LoadedPipeline, name: str) -> Material:
    """What to measure with: artifacts of the stages before, where they are made and on this machine."""
    roles = dag.roles(loaded)
    stage = cast(Distill, loaded.spec.stages[name])
    device = loaded.spec.elastic.overlaid(stage.elastic).device
    made_up = Material(stage, _recipe(loaded, roles, name), device=device)
    if loaded.missing:
        return made_up
    from orchestrator.pipeline.plan.stage_plan import resolve
    from orchestrator.pipeline.store.workspace import Workspace
    from orchestrator.storage.open import is_remote

    if is_remote(loaded.spec.store):
        return made_up
    workspace = Workspace(loaded.spec.store)
    stages = {stage.name: stage for stage in resolve(loaded)}
    found: dict[str, Artifact] = {}
    for role, need in roles[name].items():
        there = workspace.intact(stages[need].parts.kind, stages[need].key)
        if there is not None:
            found[role] = there
    return replace(
        made_up,
        teacher=found["teacher"].path if "teacher" in found else None,
        index=found["index"].path if "index" in found else None,
        index_key=found["index"].key if "index" in found else "",
        sources=loaded.spec.data,
    )


def _recipe(loaded: LoadedPipeline, roles: Mapping[str, Mapping[str, str]], name: str) -> ModelRecipe | None:
    """Of the teacher that the pipeline makes, or None if it makes none."""
    origin = loaded.spec.stages.get(dag.origin(roles, name) or "")
    return None if origin is None else origin.model_recipe()


def _estimated(loaded: LoadedPipeline, name: str, hardware: Hardware) -> PartCosts:
    stage = cast(Distill, loaded.spec.stages[name])
    if outside := [each for each, student in stage.students.items() if student.model is None]:
        raise UserError(
            "the cost of a network from elsewhere cannot be estimated, only measured",
            where=loaded.where("stages", name, "students", outside[0]),
            hint="run this on such a machine, or leave out the `hardware` section to measure on this one",
        )
    if stage.features is not None and not stage.features.uses_own:
        raise UserError(
            "the cost of a teacher from elsewhere cannot be estimated, only measured",
            where=loaded.where("stages", name, "features"),
            hint="run this on such a machine, or leave out the `hardware` section to measure on this one",
        )
    roles = dag.roles(loaded)
    upstream = {role: loaded.spec.stages[need] for role, need in roles[name].items()}
    upstream["origin"] = loaded.spec.stages[dag.origin(roles, name) or name]

    def min_devices(work: Workload) -> int:
        for devices in range(1, _MOST_DEVICES + 1):
            machines = hardware.model_copy(update={"devices": devices})
            cost = costing(
                work,
                machines,
                checkpointing=stage.activation_checkpointing,
                chunk_rows=stage.chunk_rows,
                zero_stage=zero_stage(stage, work),
            )
            if sum(cost.memory_gib.values()) <= hardware.memory_gib:
                return devices
        raise UserError(
            f"{work.name} does not fit into {hardware.memory_gib:g} GiB per device, on any number of devices",
            where=loaded.where("stages", name),
            hint="use a smaller block_size, chunk_rows or activation_checkpointing",
        )

    source = (
        f"estimated from operation counts, for {hardware.name} at {hardware.mfu:.0%} of "
        f"{hardware.peak_tflops:,.0f} TFLOP/s; nothing was measured"
    )
    works = workloads(stage, name, upstream)
    return estimated(works, hardware.peak_tflops * 1e12 * hardware.mfu, min_devices, source)


def _is_here(hardware: Hardware) -> bool:
    """Whether this machine has such devices: a word of the file's name for them is in the driver's."""
    if not Path("/dev/nvidiactl").exists():
        return False  # without the seconds that torch takes to say so
    import torch

    from orchestrator.training.device import visible_gpus

    if not visible_gpus():
        return False
    names = torch.cuda.get_device_name(0).lower().split()
    return any(word in names for word in hardware.name.lower().split())


def _prefixed(name: str, say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: say(f"{name}: {line}")
