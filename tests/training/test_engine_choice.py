"""Which engine `zero_stage: auto` stands for, and that it is the one that trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from safetensors.torch import save_file
from torch import nn
from torch.distributed import HashStore

from orchestrator.config import zero_stage
from orchestrator.config.schedules import Optimizer
from orchestrator.config.zero_stage import MAX_REPLICATED_BYTES, chosen_stage
from orchestrator.pipeline.cost.costing import costings
from orchestrator.pipeline.load import load
from orchestrator.training.engine import build_engine
from orchestrator.training.export import export_ema
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


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """This process is a group of one. It is made once: DeepSpeed keeps the first group that it sees."""
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            patch.setenv(name, value)
        from orchestrator.training.zero import import_deepspeed

        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        import_deepspeed().init_distributed("gloo", dist_init_required=False, verbose=False)
        yield
        dist.destroy_process_group()


@pytest.mark.heavy
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
@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("averaged", [True, False])
def test_an_export_is_what_safetensors_writes(
    tmp_path: Path, zero_stage: Literal[0, 3], averaged: bool
) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 2, 3), nn.LayerNorm(5))

    engine = build_engine(
        Modules(net(), ema=net() if averaged else None),
        Optimizer.model_validate({"lr": {"peak": 1e-2, "warmup_steps": 0}}),
        zero_stage=zero_stage,
        precision="fp32",
        num_blocks=1,
    )
    export_ema(engine, tmp_path / "ours.safetensors", 7)
    average = {shard.name: shard.data.view(shard.shape) for shard in engine.average()}
    assert average.keys() == net().state_dict().keys()
    save_file(average, tmp_path / "theirs.safetensors", {"step": "7"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
