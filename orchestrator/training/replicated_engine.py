"""Plain data parallelism (`zero_stage: 0`): every worker holds all weights, gradients and moments.

All trained parameters are views of one flat buffer, and so are their gradients. A step is then one sum over workers,
one norm and one AdamW update for each parameter group, and one interpolation for the EMA, whatever the number of
parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.config.schedules import Optimizer
from orchestrator.training.checkpoint.partition import Shard, cut_whole, gather_all
from orchestrator.training.engine import Engine, param_groups
from orchestrator.training.gradient_clipping import Clipper, submodule
from orchestrator.training.task import Modules


class ReplicatedEngine(Engine):
    """Trains modules that every worker holds whole; for its arguments see `build_engine`."""

    def __init__(
        self, modules: Modules, optimizer: Optimizer, *, precision: str, num_blocks: int, exact: bool
    ) -> None:
        super().__init__(modules, precision)
        self._num_blocks = num_blocks
        self._applied = False
        groups = param_groups(modules)
        name_of = {id(param): name for name, param in self._params.items()}
        # Where each parameter and each group lies in the flat buffers.
        self._spans: dict[str, slice] = {}
        group_spans, submodules, stop = [], [], 0
        for group in groups:
            start = stop
            for param in group["params"]:
                self._spans[name_of[id(param)]] = slice(stop, stop + param.numel())
                stop += param.numel()
            group_spans.append(slice(start, stop))
            submodules.append(submodule(name_of[id(group["params"][0])]))
        self._shapes = {name: self._params[name].shape for name in self._spans}

        self._master = torch.cat([self._params[name].detach().float().flatten() for name in self._spans])
        if dist.get_world_size() > 1:
            dist.broadcast(self._master, 0)
        modules.trainable.to(self._dtype)
        self._working = self._master
        if self._dtype != torch.float32:
            self._working = self._master.to(self._dtype)
            # DeepSpeed's fp32 weights start as the rounded ones; the same start gives the same results.
            self._master.copy_(self._working)
        # Of one block; its sum over blocks is in more bits where those of the weights do not suffice.
        self._gradient = torch.zeros_like(self._working)
        wide = torch.float64 if exact else torch.float32
        self._sum = self._gradient if wide == self._dtype else torch.zeros_like(self._master, dtype=wide)
        for name in self._spans:
            param = self._params[name]
            param.data = self._view(self._working, name)
            param.grad = self._view(self._gradient, name)

        self._moments = {key: torch.zeros_like(self._master) for key in ("exp_avg", "exp_avg_sq")}
        self._group_spans = group_spans
        self._optimizer = torch.optim.AdamW(
            [
                {**group, "params": [nn.Parameter(self._master[span])]}
                for group, span in zip(groups, group_spans, strict=True)
            ],
            lr=optimizer.lr.peak,
            betas=optimizer.betas,
        )
        self._link_moments(0)
        self._clipper = Clipper(submodules, optimizer.clip_norm)

        for module in (*modules.copies.values(), *modules.frozen.values()):
            self._freeze(module)
        if modules.ema is not None:
            self._average = self._master.clone()
            self._freeze(modules.ema)
            same = self._dtype == torch.float32
            self._average_working = self._average if same else self._average.to(self._dtype)
            for name, param in modules.ema.named_parameters():
                if name in self._spans:
                    param.data = self._view(self._average_working, name)
            self.ema = {name: cut_whole(name, self._average[span]).data for name, span in self._spans.items()}

    def _freeze(self, module: nn.Module) -> None:
        module.requires_grad_(False)
        module.eval()
        module.to(self._dtype)

    def _view(self, flat: Tensor, name: str) -> Tensor:
        return flat[self._spans[name]].view(self._shapes[name])

    # --- one step -----------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self._sum is not self._gradient:
            self._sum.add_(self._gradient)
            self._gradient.zero_()

    @property
    def applied(self) -> bool:
        return self._applied

    def discard(self) -> None:
        self._forget_gradient()
        self._applied = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.modules.trainable.eval()
        try:
            yield
        finally:
            self.modules.trainable.train()

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _clip(self) -> dict[str, float]:
        if dist.get_world_size() > 1:
            dist.all_reduce(self._sum)
        return self._clipper.clip([[self._sum[span]] for span in self._group_spans], 1 / self._num_blocks)

    def _update(self) -> None:
        gradient = self._sum.float()
        for group, span in zip(self._optimizer.param_groups, self._group_spans, strict=True):
            group["params"][0].grad = gradient[span]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._use_master()
        self._forget_gradient()
        self._applied = True

    def _use_master(self) -> None:
        if self._working is not self._master:
            self._working.copy_(self._master)

    def _forget_gradient(self) -> None:
        self._gradient.zero_()
        if self._sum is not self._gradient:
            self._sum.zero_()

    # --- sharded weights ----------------------------------------------------------------------------------

    def master(self) -> Iterator[Shard]:
        yield from self._shards(self._master)

    def moments(self, key: str) -> Iterator[Shard]:
        yield from self._shards(self._moments[key])

    def _shards(self, flat: Tensor) -> Iterator[Shard]:
        for name in self._params:
            if name in self._spans:
                yield cut_whole(name, self._view(flat, name))

    def load(
        self, master: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], updates: int
    ) -> None:
        self.updates = updates
        self._fill(self._master, master)
        self._use_master()
        for key, shards in moments.items():
            self._fill(self._moments[key], shards)
        self._link_moments(updates)

    def load_ema(self, shards: Mapping[str, Tensor]) -> None:
        self._fill(self._average, shards)
        self._use_average()

    def _fill(self, flat: Tensor, shards: Mapping[str, Tensor]) -> None:
        numels = {name: self._shapes[name].numel() for name in shards}
        for name, whole in gather_all(shards, numels):
            flat[self._spans[name]] = whole

    def _link_moments(self, updates: int) -> None:
        """Let AdamW's state be views of `_moments`, after so many updates."""
        for group, span in zip(self._optimizer.param_groups, self._group_spans, strict=True):
            self._optimizer.state[group["params"][0]] = {
                "step": torch.tensor(float(updates)),
                **{key: flat[span] for key, flat in self._moments.items()},
            }

    # --- EMA and copies -----------------------------------------------------------------------------------

    def update_ema(self, momentum: float) -> None:
        self._average.lerp_(self._master, 1.0 - momentum)
        self._use_average()

    def _use_average(self) -> None:
        if self._average_working is not self._average:
            self._average_working.copy_(self._average)

    def copy_ema(self, name: str, prefix: str) -> None:
        with torch.no_grad():
            for key, param in self.modules.copies[name].named_parameters():
                if prefix + key in self._spans:
                    param.copy_(self._view(self._average, prefix + key))
