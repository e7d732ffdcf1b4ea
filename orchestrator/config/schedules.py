"""Schedules by step, and the optimizer that they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

from orchestrator.config.settings import Settings


class Schedule(Settings):
    """A value that changes with the step: a warmup from `start` to `peak`, a hold, then constant or on to `end`.

    During the first `warmup_steps` steps the value goes from `start` to `peak`, in a line or by half a cosine. It
    then stays at `peak` for `hold_steps` steps. With shape `constant` it stays at `peak` until the end. With `cosine`
    or `linear` it goes from `peak` to `end`, by half a cosine or in a line, over the rest of the run; `end` may be
    higher than `peak`.
    """

    peak: float = Field(ge=0, description="The value after the warmup.")
    start: float = Field(
        0.0, ge=0, description="The value at step 0. It is used only if `warmup_steps` is above 0."
    )
    end: float = Field(
        0.0, ge=0, description="The value after the last step. It is not used with shape `constant`."
    )
    warmup_steps: int = Field(
        0, ge=0, description="The number of steps in which the value goes from `start` to `peak`."
    )
    warmup_shape: Literal["linear", "cosine"] = Field(
        "linear", description="The shape of the warmup from `start` to `peak`: a line, or half a cosine."
    )
    hold_steps: int = Field(
        0,
        ge=0,
        description="The number of steps after the warmup for which the value stays at `peak` before it moves to "
        "`end`.",
    )
    shape: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="The shape after warmup and hold: constant stays at `peak`, cosine and linear go to `end` over "
        "the rest of the run.",
    )

    def at(self, step: int, num_steps: int) -> float:
        """The value at `step` (0-based) of a run of `num_steps`."""
        if step < self.warmup_steps:
            if self.warmup_shape == "cosine":
                return _half_cosine(self.start, self.peak, step / self.warmup_steps)
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        falls_from = self.warmup_steps + self.hold_steps
        done = min(1.0, max(0, step - falls_from) / max(1, num_steps - falls_from))
        if self.shape == "linear":
            return self.peak + (self.end - self.peak) * done
        return _half_cosine(self.peak, self.end, done)


def _half_cosine(first: float, last: float, done: float) -> float:
    """From `first` (done = 0) to `last` (done = 1), level at both ends."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * done))


def _constant(value: Any) -> Any:
    return {"peak": value} if isinstance(value, (int, float)) else value


# A schedule; a number is one that stays.
Decay = Annotated[Schedule, BeforeValidator(_constant, json_schema_input_type=float | Schedule)]


def _at_most_one(schedule: Schedule) -> Schedule:
    for name in ("start", "peak", "end"):
        if getattr(schedule, name) > 1:
            raise ValueError(
                f"{name} is {getattr(schedule, name):g}: a share of the average that is kept is at most 1"
            )
    return schedule


def _above_zero(schedule: Schedule) -> Schedule:
    used = {"peak": True, "start": schedule.warmup_steps > 0, "end": schedule.shape != "constant"}
    for name in [name for name, is_used in used.items() if is_used]:
        if getattr(schedule, name) <= 0:
            raise ValueError(f"{name} is 0, by which logits would be divided: give a number above 0")
    return schedule


# A schedule of an exponential moving average's momentum, from 0 to 1.
Momentum = Annotated[Schedule, AfterValidator(_at_most_one)]
# A schedule of a temperature: above 0 at every step.
Temperature = Annotated[Schedule, AfterValidator(_above_zero)]
# An exponential moving average's factor of the optimizer.
Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def check_warmup(name: str, schedule: Schedule, steps: int) -> None:
    """Raises ValueError if a schedule would never reach its peak."""
    if schedule.warmup_steps > steps:
        raise ValueError(
            f"{name}.warmup_steps is {schedule.warmup_steps}, more than the {steps} steps there are: the peak is never "
            "reached"
        )


def moving(schedules: Mapping[str, Schedule]) -> tuple[str, ...]:
    """The names of those whose values depend on the number of all steps; a warmup does not."""
    return tuple(name for name, schedule in schedules.items() if schedule.shape != "constant")


def check_ratio(name: str, ratio: tuple[float, float]) -> None:
    """Raises ValueError unless the smaller one is first."""
    if ratio[0] > ratio[1]:
        raise ValueError(f"{name} is {ratio[0]:g} to {ratio[1]:g}: give the smaller first")


class Optimizer(Settings):
    """AdamW and its schedules, with the values of DINOv3's pretraining (arXiv 2508.10104 and its published code)."""

    lr: Schedule = Field(
        description="The learning rate by step. It is used as given and is not scaled by the batch size."
    )
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.99),
        description="The decay rates of AdamW's two moments (DINOv3's published code: 0.9 and 0.99).",
    )
    weight_decay: Decay = Field(
        Schedule(peak=0.04),
        description="AdamW's decoupled weight decay by step (DINOv3's published code: 0.04). Vectors and scalars are "
        "not decayed.",
    )
    clip_norm: float | None = Field(
        30.0,
        gt=0,
        description="The maximum gradient norm of each submodule (the backbone, each head). Larger gradients are "
        "scaled down to it (DINOv3's published code: 30); null turns clipping off.",
    )
    layer_decay: float = Field(
        0.98,
        gt=0,
        le=1,
        description="The layer-wise learning rate decay: the factor on the learning rate for each layer further from "
        "the output (DINOv3's published code: 0.98). 1 turns it off.",
    )
    patch_embed_scale: float = Field(
        0.2,
        gt=0,
        description="An extra factor on the learning rate of the patch embedding (DINOv3's published code: 0.2). 1 "
        "turns it off.",
    )
