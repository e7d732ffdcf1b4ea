"""Which engine `zero_stage: auto` stands for, and that it is the one that trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from orchestrator.config import zero_stage
from orchestrator.config.schedules import Optimizer
from orchestrator.config.zero_stage import MAX_REPLICATED_BYTES, chosen_stage
from orchestrator.pipeline.costing import costings
from orchestrator.pipeline.load import load
from orchestrator.training.engine import build_engine
from orchestrator.training.replicated_engine import ReplicatedEngine
from orchestrator.training.task import Modules
from orchestrator.training.zero_engine import ZeroEngine

CONF = Path(__file__).parents[2] / "conf"


def test_auto_goes_by_what_a_worker_would_hold() -> None:
    trained = MAX_REPLICATED_BYTES // 34  # 28 bytes a trained weight, 6 of its average
    assert chosen_stage("auto", trained, trained, 0) == 0
    assert chosen_stage("auto", trained + 1, trained + 1, 0) == 3
    assert chosen_stage("auto", 1000, 1000, MAX_REPLICATED_BYTES // 4) == 3, "a frozen teacher is held, too"
    for wanted in (0, 1, 2, 3):
        assert chosen_stage(wanted, 10**12, 0, 0) == wanted


def test_a_student_of_a_laptop_is_whole_and_the_7b_is_sharded() -> None:
    laptop = load(CONF / "full_pipeline.yaml", ["hardware={devices: 2}"], needs_data=False)
    assert laptop.spec.hardware is not None
    stages = {item.work.name: item.zero_stage for item in costings(laptop, laptop.spec.hardware)}
    assert stages.pop("high_res") == stages.pop("distill/teacher") == 3
    assert set(stages.values()) == {0}
    large = load(CONF / "paper" / "dinov3_7b.yaml", [], needs_data=False)
    assert large.spec.hardware is not None
    assert {item.zero_stage for item in costings(large, large.spec.hardware)} == {3}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a group of one."""
    import torch.distributed as dist

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    from orchestrator.training.zero import import_deepspeed

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    import_deepspeed().init_distributed("gloo", dist_init_required=False, verbose=False)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_engine_is_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine() -> object:
        net, ema = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
        settings = {"lr": {"peak": 1e-2}}
        return build_engine(
            Modules(net, ema=ema),
            Optimizer.model_validate(settings),
            zero_stage="auto",
            precision="fp32",
            num_blocks=1,
        )

    assert isinstance(engine(), ReplicatedEngine)
    monkeypatch.setattr(zero_stage, "MAX_REPLICATED_BYTES", 8 * 34 - 1)
    assert isinstance(engine(), ZeroEngine)


@pytest.mark.usefixtures("alone")
def test_exported_weights_are_copies() -> None:
    """An export is written while training goes on."""
    net = nn.Sequential(nn.Linear(3, 2))
    engine = build_engine(
        Modules(net, ema=nn.Sequential(nn.Linear(3, 2))),
        Optimizer.model_validate({"lr": {"peak": 1e-2, "warmup_steps": 0}}),
        zero_stage=0,
        precision="fp32",
        num_blocks=1,
    )
    before = engine.full_ema()
    kept = {name: value.clone() for name, value in before.items()}
    engine.backward(engine.modules.trainable(torch.ones(1, 3)).sum())
    engine.step(1e-2, 0, 0.0)
    engine.update_ema(0.5)
    assert all(torch.equal(before[name], value) for name, value in kept.items())
    assert not any(torch.equal(engine.full_ema()[name], value) for name, value in kept.items())
