"""What holds the weights in training: forward, backward, step, and every weight as a flat named shard.

A shard is this worker's consecutive part of a flattened fp32 parameter, unpadded: ceil(N/W) elements of N with W
workers. `DTensor` `Shard(0)` cuts a vector of N alike, so shards save and load at any worker count and at any ZeRO
stage without conversion (see `checkpoint.py`).

There are two engines. `ZeroEngine` is DeepSpeed, which spreads weights and moments over the workers (ZeRO 1 to 3).
`ReplicatedEngine` holds all of them in every worker: what fits many times over need not be gathered for each block.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.schedules import Optimizer
from orchestrator.config.zero_stage import ZeroStage, chosen_stage
from orchestrator.training.checkpoint.partition import Shard, cut, cut_whole, gather_all
from orchestrator.training.gradient_clipping import submodule
from orchestrator.training.skipped_updates import Skips
from orchestrator.training.task import Modules

logger = logging.getLogger("orchestrator")


def build_engine(
    modules: Modules,
    optimizer: Optimizer,
    *,
    zero_stage: ZeroStage,
    precision: str,
    num_blocks: int,
    exact: bool = False,
) -> Engine:
    """The engine that trains `modules`, which are wrapped or moved in place. Collective.

    Args:
        modules: as the task built them; what is in `trainable`, `ema` and `copies` afterwards is callable as before.
        optimizer: AdamW settings.
        zero_stage: 0: all in every worker; 1, 2 or 3: as DeepSpeed has it, frozen copies sharded at stage 3 only;
            `auto`: 0 or 3, see :func:`orchestrator.config.zero_stage.chosen_stage`.
        precision: `fp32` or `bf16`.
        num_blocks: of a step, on all workers. Its gradient is the mean of theirs; every worker makes the same number of
            backward passes, padding included.
        exact: sum gradients in float64 (stages 0 and 3), so that an update does not depend on the number of workers.
    """
    trained, averaged, frozen = _sizes(modules)
    stage = chosen_stage(zero_stage, trained, averaged, frozen)
    logger.debug("ZeRO stage %d for %d trained weights", stage, trained)
    if stage == 0:
        from orchestrator.training.replicated_engine import ReplicatedEngine

        return ReplicatedEngine(modules, optimizer, precision=precision, num_blocks=num_blocks, exact=exact)
    from orchestrator.training.zero_engine import ZeroEngine

    return ZeroEngine(
        modules, optimizer, zero_stage=stage, precision=precision, num_blocks=num_blocks, exact=exact
    )


class Engine(ABC):
    """The trainable module with its optimizer, the EMA and the frozen copies, whoever holds which part of them.

    Attributes:
        modules: the task's, with what the engine made of them.
        updates: of AdamW, by which its bias correction goes: those that changed the weights.
        skips: updates that were left out.
        unreadable: rows of photos that some worker could not read since the stage began: equal on all workers, and
            saved in checkpoints.
        ema: this worker's shards of the EMA, by parameter; empty without one.
    """

    def __init__(self, modules: Modules, precision: str) -> None:
        self.modules = modules
        # Any: DeepSpeed hangs its `ds_…` attributes on the parameters.
        self._params: dict[str, Any] = dict(modules.trainable.named_parameters())
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.updates = 0
        self.skips = Skips()
        self.unreadable: set[int] = set()
        self.ema: dict[str, Tensor] = {}

    # --- one step -----------------------------------------------------------------------------------------

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one block's loss, 0 times that of a padded one; `step` makes the sum a mean."""

    def step(self, lr: float, step: int, weight_decay: float) -> dict[str, float]:
        """Clip by submodule and update, if the whole gradient is finite; the same on all workers.

        Args:
            lr: learning rate; each group's is this times its layer-wise factor.
            step: of the stage, which decides what is still frozen.
            weight_decay: of matrices, at this step.

        Returns:
            Norms before clipping: `grad_norm` of the whole gradient, `grad_norm_backbone` and so on of its parts.
            `applied` says whether there was an update.
        """
        for group in self._optimizer_groups():
            group["lr"] = lr * group["lr_scale"] if step >= group["frozen_steps"] else 0.0
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        norms = self._clip()
        if all(map(math.isfinite, norms.values())):
            self._update()
        else:
            self.discard()
        self.updates += self.applied
        parts = {f"grad_norm_{name}": norm for name, norm in norms.items()} if len(norms) > 1 else {}
        return {"grad_norm": math.hypot(*norms.values()), **parts}

    @property
    @abstractmethod
    def applied(self) -> bool:
        """Whether the newest `step` changed the weights."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the gradient of all blocks so far, in place of `step`; weights and moments stay as they are."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """The trainable module without what it does in training only, such as drop-path; for forwards alone."""

    def backward_is_finite(self, loss: Tensor) -> bool:
        """`backward`, to find out whether this one block's gradient is finite; `discard` is to follow."""
        finite: list[Tensor] = []
        hooks = [
            param.register_hook(lambda gradient: finite.append(gradient.isfinite().all()))
            for param in self._params.values()
            if param.requires_grad
        ]
        try:
            self.backward(loss)
        finally:
            for hook in hooks:
                hook.remove()
        return all(map(bool, finite))

    @abstractmethod
    def _optimizer_groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups, with the settings of :func:`param_groups`."""

    @abstractmethod
    def _clip(self) -> dict[str, float]:
        """Make the sum of all gradients their mean, and clip it; norms in between, by submodule. Collective."""

    @abstractmethod
    def _update(self) -> None:
        """AdamW's step with the gradient as it is."""

    # --- sharded weights ----------------------------------------------------------------------------------

    @abstractmethod
    def master(self) -> Iterator[Shard]:
        """fp32 weights of the trainable module; views at stages 0 and 3."""

    @abstractmethod
    def moments(self, key: str) -> Iterator[Shard]:
        """`exp_avg` or `exp_avg_sq`; zeros before the first update."""

    @abstractmethod
    def load(
        self, master: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], updates: int
    ) -> None:
        """Put shards (unpadded, as :meth:`master` yields them) and AdamW's count of updates in place. Collective."""

    @abstractmethod
    def load_ema(self, shards: Mapping[str, Tensor]) -> None:
        """The same for the EMA. Collective."""

    # --- EMA and copies -----------------------------------------------------------------------------------

    @abstractmethod
    def update_ema(self, momentum: float) -> None:
        """See :class:`orchestrator.training.task.Weights`."""

    def average(self) -> Iterator[Shard]:
        """This worker's fp32 shards of the EMA; of the weights, without an EMA."""
        for shard in self.master():
            yield replace(shard, data=self.ema.get(shard.name, shard.data))

    def copy_ema(self, name: str, prefix: str) -> None:
        """See :class:`orchestrator.training.task.Weights`."""
        part = {key.removeprefix(prefix): value for key, value in self.ema.items() if key.startswith(prefix)}
        self.write(self.modules.copies[name], part)

    def write(self, module: nn.Module, shards: Mapping[str, Tensor]) -> None:
        """Overwrite a frozen module's weights from fp32 shards, in its own precision. Collective."""
        params = {name: param for name, param in named_parameters(module) if name in shards}
        sharded = {name: param for name, param in params.items() if hasattr(param, "ds_tensor")}
        replicated = {name: param for name, param in params.items() if name not in sharded}
        with torch.no_grad():
            for name, param in sharded.items():
                param.ds_tensor[: shards[name].numel()].copy_(shards[name])
            numels = {name: param.numel() for name, param in replicated.items()}
            for name, value in gather_all({name: shards[name] for name in replicated}, numels):
                replicated[name].copy_(value.view(replicated[name].shape))

    def read(self, module: nn.Module) -> Iterator[Shard]:
        """A frozen module's weights as fp32 shards."""
        for name, param in named_parameters(module):
            if hasattr(param, "ds_tensor"):
                yield cut(name, param.ds_tensor.detach().float(), param.ds_numel, param.ds_shape)
            else:
                yield cut_whole(name, param.float())


def named_parameters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Of the module inside a DeepSpeed engine, or of the module itself."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, nn.Module)
    yield from inner.named_parameters()


def param_groups(modules: Modules) -> list[dict[str, Any]]:
    """AdamW groups by submodule (for `Clipper`), learning-rate factor, frozen steps and decay.

    Vectors and scalars are never decayed.
    """
    groups: dict[tuple[str, float, int, bool], dict[str, Any]] = {}
    for name, param in modules.trainable.named_parameters():
        if not param.requires_grad:
            continue
        decayed = param.ndim > 1
        scale = modules.lr_scales.get(name, 1.0)
        frozen = modules.frozen_steps.get(name, 0)
        settings = {"params": [], "decayed": decayed, "lr_scale": scale, "frozen_steps": frozen}
        groups.setdefault((submodule(name), scale, frozen, decayed), settings)["params"].append(param)
    return list(groups.values())


def _sizes(modules: Modules) -> tuple[int, int, int]:
    """Numbers of weights: trained, averaged and frozen ones."""

    def count(*several: nn.Module, trained: bool | None = None) -> int:
        params = (param for module in several for param in module.parameters())
        return sum(param.numel() for param in params if trained in (None, param.requires_grad))

    untrained = count(modules.trainable, trained=False)
    frozen = count(*modules.copies.values(), *modules.frozen.values())
    averaged = count(modules.ema) if modules.ema is not None else 0
    return count(modules.trainable, trained=True), averaged, untrained + frozen
