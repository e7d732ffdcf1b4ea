"""The schedules of a pipeline file: found wherever a config has one, and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from orchestrator.config.schedules import Schedule
from orchestrator.errors import UserError
from orchestrator.pipeline.dag import order
from orchestrator.pipeline.load import LoadedPipeline

_POINTS = 400


def draw(loaded: LoadedPipeline, path: Path) -> int:
    """Draw every schedule of every stage with steps into the PNG `path`; returns how many there are.

    A row holds what stages call by one name, so that a weight can be followed from stage to stage.

    Raises:
        UserError: no stage has a schedule, or the picture cannot be written there.
    """
    from orchestrator.evaluation.report.panels import panels

    table: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    num_steps: dict[str, int] = {}
    for stage_name in order(loaded):
        stage = loaded.spec.stages[stage_name]
        steps = getattr(stage, "steps", None)
        if steps is None:
            continue
        for name, schedule in find(stage):
            num_steps[stage_name] = steps
            table.setdefault(name, {})[stage_name] = sample(schedule, steps)
    if not table:
        raise UserError("no stage of this pipeline has a schedule", where=str(loaded.path))
    if path.suffix != ".png":
        raise UserError(
            f"schedules are drawn as a .png file, not {path.suffix or 'a file without a suffix'}",
            where=str(path),
        )
    panels(table, {name: f"{name}\n{steps:,} steps" for name, steps in num_steps.items()}, path)
    return sum(map(len, table.values()))


def find(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Schedule]]:
    """Every schedule below a config, with the path of its key."""
    for name in type(config).model_fields:
        yield from _find(getattr(config, name), f"{prefix}{name}")


def _find(value: object, name: str) -> Iterator[tuple[str, Schedule]]:
    if isinstance(value, Schedule):
        yield name, value
    elif isinstance(value, BaseModel):
        yield from find(value, f"{name}.")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _find(item, f"{name}.{key}")


def sample(schedule: Schedule, num_steps: int) -> tuple[list[float], list[float]]:
    """Steps and values, dense enough to draw, with the corner at the end of the warmup."""
    steps = {round(point * (num_steps - 1) / (_POINTS - 1)) for point in range(_POINTS)}
    steps |= {step for step in (schedule.warmup_steps - 1, schedule.warmup_steps) if 0 <= step < num_steps}
    at = sorted(steps)
    return [float(step) for step in at], [schedule.at(step, num_steps) for step in at]
