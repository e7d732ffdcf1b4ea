"""A training step of a small model costs at most 5 % more processor time than in a plain loop.

The pretraining step of `conf/full_pipeline.yaml`: `vit_nano`, 32 images in two blocks, 2 × 64 px and 4 × 32 px crops.
All arms train the same task on the same random pixels, in one process on one thread, by turns. The plain loop is what
a user would write: `backward` for each block, clipping by submodule, torch's fused AdamW and a foreach EMA. The others
are our engines, as a worker runs them. Loading of photographs, Ray and checkpoints are not in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from bench._plain import PlainWeights
from bench.harness import Arm, Claim, require_same_losses, summarize
from orchestrator.config.zero_stage import ZeroStage
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.stages.ssl.task import SelfSupervisedTask
from orchestrator.training.collectives import AllWorkers
from orchestrator.training.engine import build_engine, param_groups
from orchestrator.training.gradient_clipping import submodule
from orchestrator.training.task import BlockTensors, Modules

_FILE = Path(__file__).parents[1] / "conf" / "full_pipeline.yaml"
_GOAL = 1.05
_PLAIN, _OURS = "plain loop", "auto, which is 0"
_ENGINES: dict[str, tuple[ZeroStage, bool]] = {
    _OURS: ("auto", False),
    "0, exact sums": (0, True),
    "ZeRO-1": (1, False),
    "ZeRO-2": (2, False),
    "ZeRO-3": (3, False),
    "ZeRO-3, exact sums": (3, True),
}
_LR, _DECAY, _MOMENTUM, _WARM_UP = 1e-4, 0.04, 0.99, 2


def run(quick: bool) -> Claim:
    """Four steps of each arm, twenty in the full run."""
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    from orchestrator.training.process_group import join

    join(HashStore(), 0, 1)
    stage = yaml.safe_load(_FILE.read_text())["stages"]["pretrain"]
    config = Pretrain.model_validate({**stage, "needs": ()})
    arms: dict[str, Callable[[int], float]] = {_PLAIN: _plain(config)}
    arms |= {name: _engine(config, *how) for name, how in _ENGINES.items()}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for step in range(_WARM_UP + (4 if quick else 20)):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            began = time.process_time()
            losses[name].append(arms[name](step))
            if step >= _WARM_UP:
                cpu[name].append(time.process_time() - began)
    # Later steps drift apart: a row's nearest neighbour may change with the last bits of a sum.
    require_same_losses({name: values[:3] for name, values in losses.items()})
    ratios = {name: _ratio(cpu[name], cpu[_PLAIN]) for name in names if name != _PLAIN}
    return Claim(
        claim="processor time of a step of our engine over that of a plain loop, `vit_nano`",
        figure=ratios[_OURS].median,
        unit="times",
        goal=_GOAL,
        limit=1.0,
        arms=ratios | {f"{name}, seconds": summarize(values) for name, values in cpu.items()},
        notes=(
            "ratios are step by step, with the same pixels, and the median of them is the figure",
            "the plain loop has no sums that are the same for any number of workers, and cannot be stopped",
        ),
    )


def _ratio(ours: list[float], theirs: list[float]) -> Arm:
    return summarize([one / other for one, other in zip(ours, theirs, strict=True)])


def _engine(config: Pretrain, zero_stage: ZeroStage, exact: bool) -> Callable[[int], float]:
    task, modules = _task(config)
    engine = build_engine(
        modules,
        config.optimizer,
        zero_stage=zero_stage,
        precision="fp32",
        num_blocks=_num_blocks(config),
        exact=exact,
    )
    workers = AllWorkers(exact)

    def step(number: int) -> float:
        total = 0.0
        blocks = _blocks(config, number)
        task.prepare_step(number)
        for block, target in zip(blocks, task.targets(blocks, workers), strict=True):
            loss = task.losses(block, target).total
            engine.backward(loss)
            total += float(loss.detach()) / len(blocks)
        engine.step(_LR, number, _DECAY)
        engine.update_ema(_MOMENTUM)
        return total

    return step


def _plain(config: Pretrain) -> Callable[[int], float]:
    task, modules = _task(config)
    assert modules.ema is not None
    for module in (modules.ema, *modules.copies.values(), *modules.frozen.values()):
        module.eval()
    groups = param_groups(modules)
    optimizer = torch.optim.AdamW(groups, lr=_LR, betas=config.optimizer.betas, fused=True)
    weights = PlainWeights(modules)
    children = _children(modules.trainable)
    limit = config.optimizer.clip_norm or float("inf")

    def step(number: int) -> float:
        total = 0.0
        blocks = _blocks(config, number)
        task.prepare_step(number)
        for block, target in zip(blocks, task.targets(blocks, AllWorkers()), strict=True):
            loss = task.losses(block, target).total / len(blocks)
            loss.backward()
            total += float(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] = _LR * group["lr_scale"] if number >= group["frozen_steps"] else 0.0
            group["weight_decay"] = _DECAY if group["decayed"] else 0.0
        for params in children.values():
            nn.utils.clip_grad_norm_(params, limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights.update_ema(_MOMENTUM)
        return total

    return step


def _children(module: nn.Module) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for name, param in module.named_parameters():
        found.setdefault(submodule(name), []).append(param)
    return found


def _task(config: Pretrain) -> tuple[SelfSupervisedTask, Modules]:
    torch.manual_seed(0)
    recipe = config.model_recipe()
    assert recipe is not None
    task = SelfSupervisedTask(config, recipe, 0, None)
    return task, task.build("cpu")


def _num_blocks(config: Pretrain) -> int:
    return config.batch_size // config.block_size


def _blocks(config: Pretrain, step: int) -> list[BlockTensors]:
    return [_block(config, step, index) for index in range(_num_blocks(config))]


def _block(config: Pretrain, step: int, index: int) -> BlockTensors:
    random = torch.Generator().manual_seed(step * 100 + index)
    crops, size = config.crops, config.block_size

    def pixels(views: int, side: Any) -> Tensor:
        return torch.randint(0, 256, (views, size, 3, side, side), dtype=torch.uint8, generator=random)

    recipe = config.model_recipe()
    assert recipe is not None
    patches = (int(crops.global_size) // recipe.tower.patch_size) ** 2
    masks = torch.zeros(crops.num_global, size, patches, dtype=torch.bool)
    masks[:, : size // 2] = torch.rand(crops.num_global, size // 2, patches, generator=random) < 0.3
    tensors = {
        "globals": pixels(crops.num_global, crops.global_size),
        "locals": pixels(crops.num_local, crops.local_size),
        "masks": masks,
    }
    return BlockTensors(step, index, 1.0, tensors, size)
