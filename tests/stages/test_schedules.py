"""Schedules against torch's and interpolation, and that a task does at each step what its schedules say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from orchestrator.config.schedules import Optimizer, Schedule
from orchestrator.stages.common.nets import HeadedBackbone
from orchestrator.stages.ssl.config import SelfSupervised
from orchestrator.stages.ssl.gram_anchor import GramAnchor
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.stages.ssl.task import SelfSupervisedTask
from orchestrator.training.task import BlockTensors

from .small import BASE, HEADS, PAPER, RECIPE


@pytest.mark.parametrize(
    ("stage", "key", "expected"),
    [
        ("pretrain", "optimizer.lr", {0: 0.0, 25_000: 1e-4, 100_000: 4e-4, 999_999: 4e-4}),
        ("pretrain", "teacher_temperature", {0: 0.04, 50_000: 0.055, 100_000: 0.07, 999_999: 0.07}),
        ("pretrain", "ema", {0: 0.999, 999_999: 0.999}),
        ("gram", "optimizer.lr", {0: 2.4e-4, 199_999: 2.4e-4}),
        ("gram", "local_weight", {0: 1.0, 500: 0.75, 1000: 0.5, 199_999: 0.5}),
        # Half a cosine: 2 · (1 − cos(π/4)) / 2 at a quarter of the ramp, where a line would have 0.5.
        ("gram", "gram.weight", {0: 0.0, 250: 1 - 0.5**0.5, 500: 1.0, 1000: 2.0, 199_999: 2.0}),
        ("high_res", "optimizer.lr", {0: 0.0, 5000: 7.0711e-5 / 2, 10_000: 7.0711e-5, 29_999: 7.0711e-5}),
        ("high_res", "gram.weight", {0: 1.5, 29_999: 1.5}),
    ],
)
def test_the_papers_schedules(stage: str, key: str, expected: dict[int, float]) -> None:
    value = PAPER[stage]
    for part in key.split("."):
        value = value[part]
    schedule = Schedule.model_validate(value)
    for step, wanted in expected.items():
        assert schedule.at(step, PAPER[stage]["steps"]) == pytest.approx(wanted, rel=1e-9), step


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("start", [0.0, 0.04])
def test_shapes_equal_interpolation_and_torchs_cosine(start: float, warmup: int) -> None:
    steps, peak, end = 40, 0.5, 0.2
    at = np.arange(steps)
    for shape in ("constant", "linear", "cosine"):
        schedule = Schedule(start=start, peak=peak, end=end, warmup_steps=warmup, shape=shape)
        got = [schedule.at(step, steps) for step in range(steps)]
        rising = np.interp(at, [0, warmup], [start, peak]) if warmup else np.full(steps, peak)
        falling = {
            "constant": np.full(steps, peak),
            "linear": np.interp(at, [warmup, steps], [peak, end]),
            "cosine": torch_cosine(peak, end, steps, warmup),
        }[shape]
        np.testing.assert_allclose(got, np.where(at < warmup, rising, falling), rtol=1e-9, err_msg=shape)


def test_the_papers_high_resolution_rates_add_up_to_what_was_published() -> None:
    """1.77 over 30k steps (recipe.md); with a ramp of 10k alone it would be 0.36."""
    schedule = Schedule.model_validate(PAPER["high_res"]["optimizer"]["lr"])
    steps = PAPER["high_res"]["steps"]
    assert sum(schedule.at(step, steps) for step in range(steps)) == pytest.approx(1.77, abs=0.005)


@pytest.mark.parametrize(("start", "peak"), [(0.0, 2.0), (1.0, 0.5)])
def test_a_cosine_ramp_is_torchs_cosine(start: float, peak: float) -> None:
    """From start to peak, either way, level at both ends; then as without it."""
    ramp = Schedule(start=start, peak=peak, warmup_steps=9, warmup_shape="cosine", end=0.1, shape="linear")
    line = ramp.model_copy(update={"warmup_shape": "linear"})
    got = [ramp.at(step, 30) for step in range(30)]
    np.testing.assert_allclose(got[:9], torch_cosine(start, peak, 9, 0), rtol=1e-9, atol=1e-12)
    assert got[9] == peak
    assert got[9:] == [line.at(step, 30) for step in range(9, 30)]


def test_weight_decay_is_a_number_or_a_schedule() -> None:
    """The published ones: 0.04, 0.04 to 0.4 by a cosine, 0.04 to 0.2 by a line."""
    for given, wanted in (
        (0.04, np.full(41, 0.04)),
        ({"peak": 0.04, "end": 0.4, "shape": "cosine"}, np.append(torch_cosine(0.04, 0.4, 40, 0), 0.4)),
        ({"peak": 0.04, "end": 0.2, "shape": "linear"}, np.linspace(0.04, 0.2, 41)),
    ):
        decay = Optimizer.model_validate({"lr": {"peak": 1e-3}, "weight_decay": given}).weight_decay
        np.testing.assert_allclose([decay.at(step, 40) for step in range(41)], wanted, rtol=1e-9)
    assert Optimizer(lr=Schedule(peak=1e-3)).weight_decay == Schedule(peak=0.04)
    for wrong in (-0.1, {"peak": 0.1, "end": -0.1, "shape": "linear"}, {"peak": float("nan")}):
        with pytest.raises(ValidationError, match=r"greater than or equal to 0|finite number"):
            Optimizer.model_validate({"lr": {"peak": 1e-3}, "weight_decay": wrong})


def torch_cosine(peak: float, end: float, steps: int, warmup: int) -> np.ndarray[Any, Any]:
    """torch's own schedule from the end of the warmup on."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=end)
    values = [peak] * warmup
    while len(values) < steps:
        values.append(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    return np.array(values)


def test_the_emas_cosine_ends_at_one() -> None:
    """Distillation's momentum: 0.994 to 1 over the run, never past it."""
    schedule = Schedule(peak=0.994, end=1.0, shape="cosine")
    values = [schedule.at(step, 1000) for step in (0, 500, 999, 1000, 2000)]
    assert values == pytest.approx([0.994, 0.997, 1.0, 1.0, 1.0], abs=1e-7)
    assert max(values) <= 1.0


def a_block(config: SelfSupervised) -> BlockTensors:
    random = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 4, 16, dtype=torch.bool)
    masks[:, ::2, 3:7] = True
    tensors = {
        "globals": torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=random),
        "locals": torch.randint(256, (2, 4, 3, 16, 16), dtype=torch.uint8, generator=random),
        "masks": masks,
    }
    return BlockTensors(0, 0, 1.0, tensors)


def figures_at(step: int, gram_weights: Path | None, **settings: Any) -> dict[str, float]:
    """The weighted loss terms of one fixed block, with what the task has set for `step`."""
    kind, cls = ("pretrain", Pretrain) if gram_weights is None else ("gram_anchor", GramAnchor)
    model = {"model": "vit_femto"} if gram_weights is None else {}
    config = cls.model_validate({**BASE, **model, "kind": kind, "needs": "x", **settings})
    torch.manual_seed(0)
    task = SelfSupervisedTask(config, RECIPE, 0, gram_weights)
    modules = task.build("cpu")
    with torch.no_grad():  # a student that differs from its teachers
        for parameter in modules.trainable.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    task.prepare_step(step)
    block = a_block(config)
    losses = task.losses(block, task.targets([block], lambda tensor: tensor)[0])
    return {name: value.item() for name, value in losses.metrics.items()} | {"total": losses.total.item()}


RULES: dict[str, tuple[str, dict[str, Any], dict[int, Any], bool]] = {
    "teacher temperature 0.04 to 0.07": (
        "teacher_temperature",
        {"start": 0.04, "peak": 0.07, "warmup_steps": 6},
        {0: 0.04, 2: 0.05, 6: 0.07, 99: 0.07},
        False,
    ),
    "DINO on locals 1 to 0.5": (
        "local_weight",
        {"start": 1.0, "peak": 0.5, "warmup_steps": 10},
        {0: 1.0, 4: 0.8, 10: 0.5, 99: 0.5},
        True,
    ),
    "Gram 0 to 2": (
        "gram",
        {"weight": {"start": 0.0, "peak": 2.0, "warmup_steps": 10}},
        {step: {"weight": {"peak": peak}} for step, peak in ((0, 0.0), (5, 1.0), (10, 2.0), (99, 2.0))},
        True,
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_step_has_the_value_of_its_schedule(rule: str, tmp_path: Path) -> None:
    """At each step a scheduled task does what a task with that constant does, and no other."""
    field, schedule, constants, anchored = RULES[rule]
    gram = tmp_path / "anchor.safetensors" if anchored else None
    if gram is not None:
        torch.manual_seed(5)
        state = HeadedBackbone("vit_femto", 0.0, HEADS).state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, gram)
    wanted = {
        step: value if isinstance(value, dict) else {"peak": value} for step, value in constants.items()
    }
    for step, constant in wanted.items():
        expected = figures_at(0, gram, **{field: constant})
        assert figures_at(step, gram, **{field: schedule}) == pytest.approx(expected, rel=1e-6), step
    totals = [figures_at(step, gram, **{field: schedule})["total"] for step in wanted]
    assert len({round(total, 5) for total in totals}) == 3, "the schedule must show in the loss"


class Recorder:
    """Weights that only note what a task asks of them."""

    def __init__(self) -> None:
        self.momenta: list[float] = []

    def update_ema(self, momentum: float) -> None:
        self.momenta.append(momentum)

    def copy_ema(self, name: str, prefix: str) -> None:
        raise AssertionError("no Gram teacher here")


def test_the_ema_follows_its_schedule_once_a_step() -> None:
    config = Pretrain.model_validate(
        {**BASE, "model": "vit_femto", "kind": "pretrain", "needs": "x", "steps": 4}
        | {"ema": {"peak": 0.994, "end": 1.0, "shape": "cosine"}}
    )
    task, recorder = SelfSupervisedTask(config, RECIPE, 0, None), Recorder()
    task.build("cpu")
    for step in range(4):
        task.after_step(step, recorder, {})
    wanted = [1 - 0.006 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    assert recorder.momenta == pytest.approx(wanted, rel=1e-12)
