"""What things cost in seconds: the numbers a simulation turns on, from a measured run or from these defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from orchestrator.config.settings import Settings
from orchestrator.errors import UserError, nearest
from orchestrator.simulation.json_file import JsonFile
from orchestrator.simulation.trace import MAX_SECONDS

_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


class StageCosts(Settings):
    """Costs of one stage, in seconds. The defaults are guesses for a small model on CPUs; measure yours."""

    block_s: _Seconds = Field(0.5, description="The time to compute one block, in seconds.")
    step_s: _Seconds = Field(
        0.05, description="The time of a step beyond its blocks (optimizer, communication), in seconds."
    )
    measured_step_s: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0, le=MAX_SECONDS)]] = Field(
        {},
        description="The measured time of a whole step by number of workers, in seconds. It overrides `block_s` and "
        "`step_s`.",
    )
    stall_s: _Seconds = Field(0.05, description="The time that a checkpoint stops training, in seconds.")
    write_s: _Seconds = Field(
        1.0, description="The time until a checkpoint is committed in the background, in seconds."
    )
    detect_s: _Seconds = Field(
        1.0, description="The time until the loss of a machine is detected, in seconds."
    )
    start_s: _Seconds = Field(
        1.0, description="The time for a worker group to form and to build the model, in seconds."
    )
    restore_s: _Seconds = Field(0.5, description="The time to read a checkpoint, in seconds.")
    first_step_s: _Seconds = Field(
        0.5, description="The extra time of a worker group's first step, in seconds."
    )
    warm_s: _Seconds = Field(
        10.0, description="The time from a machine's start until its worker slot is ready, in seconds."
    )
    overhead_s: _Seconds = Field(2.0, description="The pipeline's overhead per stage, in seconds.")
    seconds: _Seconds = Field(10.0, description="The duration of a stage that does not train, in seconds.")

    def step(self, num_blocks: int, workers: int) -> float:
        """Seconds of a step of `num_blocks` on `workers`: measured, or as the worker with most blocks takes.

        Between measured counts it is the nearest one's, with its blocks scaled by ceil(blocks / workers).
        """
        slots = -(-num_blocks // workers)
        if not self.measured_step_s:
            return self.step_s + slots * self.block_s
        near = min(self.measured_step_s, key=lambda count: (abs(count - workers), count))
        seconds = self.measured_step_s[near]
        fixed = min(self.step_s, seconds)
        return fixed + (seconds - fixed) * slots / -(-num_blocks // near)


class Costs(Settings):
    """A costs file: `default` for every stage, and what single stages (or `stage/student`) have otherwise."""

    format: Literal["orchestrator-costs"] = "orchestrator-costs"
    version: Literal[1] = 1
    source: str = Field("defaults", description="The origin of the costs, such as the id of a run.")
    default: dict[str, Any] = Field({})
    stages: dict[str, dict[str, Any]] = Field({})

    def of(self, name: str) -> StageCosts:
        """Costs of stage `name`; those of `distill/a` fall back to `distill`'s, then to the default."""
        parents = [name.partition("/")[0], name] if "/" in name else [name]
        merged = dict(self.default)
        for known in parents:
            merged |= self.stages.get(known, {})
        return StageCosts.model_validate(merged)

    def override(self, settings: Sequence[str], known_stages: Sequence[str]) -> Costs:
        """With `key=seconds` or `stage.key=seconds` laid over.

        Raises:
            UserError: not of that form, no such key or stage, or not a number of seconds.
        """
        default, stages = dict(self.default), {name: dict(own) for name, own in self.stages.items()}
        for setting in settings:
            dotted, _, text = setting.partition("=")
            stage, _, key = dotted.rpartition(".")
            where = f"command line `--cost {setting}`"
            if key not in StageCosts.model_fields or key == "measured_step_s":
                close = nearest(key, StageCosts.model_fields)
                hint = (
                    f"did you mean {close!r}?"
                    if close
                    else f"there are: {', '.join(StageCosts.model_fields)}"
                )
                raise UserError(f"there is no cost {key!r}", where=where, hint=hint)
            if stage and stage.partition("/")[0] not in known_stages:
                raise UserError(
                    f"the pipeline has no stage {stage!r}", where=where, hint=_nearest_of(stage, known_stages)
                )
            try:
                StageCosts.model_validate({key: text})
            except ValidationError:
                raise UserError(f"{text!r} is not a number of seconds", where=where) from None
            target = stages.setdefault(stage, {}) if stage else default
            target[key] = float(text)
            if key in ("block_s", "step_s"):
                target["measured_step_s"] = {}
        return Costs(source=f"{self.source}, --cost", default=default, stages=stages)

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(self.model_dump_json(indent=1) + "\n")


def read_costs(path: Path, stages: Sequence[str]) -> Costs:
    """Read a costs file for a pipeline with these stages.

    Raises:
        UserError: whatever is wrong with it, a stage that the pipeline does not have among it.
    """
    file = JsonFile(path, "costs file")
    costs = file.parse(Costs)
    for name in costs.stages:
        stage = name.partition("/")[0]
        if stage not in stages:
            where = file.where(("stages", name))
            raise UserError(
                f"the pipeline has no stage {stage!r}", where=where, hint=_nearest_of(stage, stages)
            )
    sections = [
        (("default",), costs.default),
        *((("stages", name), own) for name, own in costs.stages.items()),
    ]
    for keys, section in sections:
        try:
            StageCosts.model_validate(section)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            unknown = first["type"] == "extra_forbidden"
            what = f"unknown cost {key!r}" if unknown else f"{key}: {first['msg'].lower()}".removeprefix(": ")
            hint = _nearest_of(key, list(StageCosts.model_fields)) if unknown else None
            raise UserError(what, where=file.where((*keys, *first["loc"][:1])), hint=hint) from None
    return costs


def _nearest_of(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else f"there are: {', '.join(known)}"
