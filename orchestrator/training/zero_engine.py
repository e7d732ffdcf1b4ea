"""DeepSpeed's ZeRO behind the surface of :class:`orchestrator.training.engine.Engine`.

ZeRO-3 cuts a parameter of N elements into ceil(N/W) consecutive pieces, as our shards are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.config.schedules import Optimizer
from orchestrator.training.checkpoint.partition import Shard, cut, cut_whole, gather
from orchestrator.training.engine import Engine, param_groups
from orchestrator.training.gradient_clipping import Clipper, submodule
from orchestrator.training.task import Modules
from orchestrator.training.zero import sum_exactly, zero_config


class ZeroEngine(Engine):
    """Wraps a task's modules in DeepSpeed engines; for its arguments see `build_engine`."""

    def __init__(
        self,
        modules: Modules,
        optimizer: Optimizer,
        *,
        zero_stage: int,
        precision: str,
        num_blocks: int,
        exact: bool,
    ) -> None:
        import deepspeed

        super().__init__(modules, precision)
        world = dist.get_world_size()
        # What makes a mean of DeepSpeed's sums, which are means over workers unless they are exact. It multiplies the
        # whole sum: a factor of each block's loss would be rounded into its gradient, for each number of workers anew.
        self._scale = (1 if exact else world) / num_blocks
        self.zero_stage = zero_stage
        num_trained = sum(param.numel() for param in self._params.values() if param.requires_grad)
        config = zero_config(zero_stage, precision, -(-num_blocks // world), num_trained)
        if zero_stage == 3 and modules.zero3_leaf_modules:
            for module in (
                modules.trainable,
                modules.ema,
                *modules.copies.values(),
                *modules.frozen.values(),
            ):
                _mark_leaf_modules(module, modules.zero3_leaf_modules)
        self._optimizer = _AdamW(
            param_groups(modules),
            lr=optimizer.lr.peak,
            betas=optimizer.betas,
        )
        ema_source = modules.ema
        self._engine, *_ = deepspeed.initialize(
            model=modules.trainable, optimizer=self._optimizer, config=config, dist_init_required=False
        )
        modules.trainable = self._engine
        if exact:
            sum_exactly(self._engine.optimizer)
        self._clipper = Clipper(self._submodules(), optimizer.clip_norm)
        if ema_source is not None:
            modules.ema = self._freeze(ema_source, config)
        modules.copies = {name: self._freeze(module, config) for name, module in modules.copies.items()}
        modules.frozen = {name: self._freeze(module, config) for name, module in modules.frozen.items()}
        if modules.ema is not None:
            self.ema = {shard.name: shard.data.clone() for shard in self.master()}
            self._spread_ema()

    def _submodules(self) -> list[str]:
        """The submodule of each of DeepSpeed's parameter groups."""
        zero = self._engine.optimizer
        name_of = {id(param): name for name, param in self._params.items()}
        groups = zero.fp16_groups if hasattr(zero, "fp16_groups") else zero.bit16_groups
        found = [{submodule(name_of[id(param)]) for param in group} for group in groups]
        assert all(len(names) == 1 for names in found), found
        return [names.pop() for names in found]

    def _freeze(self, module: nn.Module, config: dict[str, Any]) -> nn.Module:
        import deepspeed

        module.requires_grad_(False)
        module.eval()
        if self.zero_stage < 3:
            return module.to(self._dtype)
        frozen_config = {k: v for k, v in config.items() if k != "data_types"}
        engine, *_ = deepspeed.initialize(model=module, config=frozen_config, dist_init_required=False)
        engine.eval()
        return engine  # type: ignore[no-any-return]

    # --- one step -----------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the block; the update is in `step`

    @property
    def applied(self) -> bool:
        return bool(self._engine.was_step_applied())

    def discard(self) -> None:
        # NaN, which DeepSpeed never applies, whatever the precision and the stage.
        spoilt = [part for parts in self._gradients() for part in parts]
        for part in spoilt:
            part.fill_(math.nan)
        self._engine.step()
        assert not self.applied, "DeepSpeed applied a gradient of NaN"
        # ZeRO-3 uses that memory again and never writes to its padding.
        for part in spoilt:
            part.zero_()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def _gradients(self) -> list[list[Tensor]]:
        """This worker's parts of the gradient, by parameter group."""
        averaged = self._engine.optimizer.averaged_gradients
        return [averaged[index] for index in range(len(self._optimizer_groups()))]

    def _clip(self) -> dict[str, float]:
        return self._clipper.clip(self._gradients(), self._scale, sharded=True)

    def _update(self) -> None:
        self._engine.step()

    # --- sharded weights ----------------------------------------------------------------------------------

    def master(self) -> Iterator[Shard]:
        yield from self._hp(None)

    def moments(self, key: str) -> Iterator[Shard]:
        if self.updates == 0:
            self._fill_optimizer_state(0)
        if self.zero_stage < 3:
            # ZeRO 1 and 2 step one parameter group at a time and link the state of the first one only.
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        yield from self._hp(key)

    def _hp(self, key: str | None) -> Iterator[Shard]:
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
        )

        for name, param in self._params.items():
            if not param.requires_grad:
                continue
            if self.zero_stage == 3:
                local = (
                    safe_get_local_fp32_param(param)
                    if key is None
                    else safe_get_local_optimizer_state(param, key)
                )
                yield cut(name, local.detach(), param.ds_numel, param.ds_shape)
            else:
                full = (
                    safe_get_full_fp32_param(param)
                    if key is None
                    else safe_get_full_optimizer_state(param, key)
                )
                yield cut_whole(name, full)

    def load(
        self, master: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], updates: int
    ) -> None:
        self.updates = updates
        self._fill_optimizer_state(updates)
        with torch.no_grad():
            for name, param in self._params.items():
                if not param.requires_grad:
                    continue
                self._put(param, master[name], None)
                for key, values in moments.items():
                    self._put(param, values[name], key)

    def _fill_optimizer_state(self, step: int) -> None:
        # A client AdamW has no state before its first step; ZeRO's setters need it to exist.
        zero = self._engine.optimizer
        flats = (
            zero.fp32_partitioned_groups_flat
            if self.zero_stage == 3
            else zero.single_partition_of_fp32_groups
        )
        for flat in flats:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        if self.zero_stage < 3:
            # Else a second load would find the first one's links and leave the moments at zero.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _put(self, param: Any, part: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.zero_stage == 3:
            padded = torch.zeros(param.ds_tensor.numel(), dtype=torch.float32, device=part.device)
            padded[: part.numel()] = part
            if key is None:
                safe_set_local_fp32_param(param, padded)
                param.ds_tensor.data.copy_(padded)
            else:
                safe_set_local_optimizer_state(param, padded, key)
            return
        full = gather(part, param.numel()).view(param.shape)
        if key is None:
            safe_set_full_fp32_param(param, full)
            param.data.copy_(full)
        else:
            safe_set_full_optimizer_state(param, full, key)

    # --- EMA and copies -----------------------------------------------------------------------------------

    def load_ema(self, shards: Mapping[str, Tensor]) -> None:
        for name, value in shards.items():
            self.ema[name].copy_(value)
        self._spread_ema()

    def update_ema(self, momentum: float) -> None:
        for shard in self.master():
            self.ema[shard.name].lerp_(shard.data, 1.0 - momentum)
        self._spread_ema()

    def _spread_ema(self) -> None:
        assert self.modules.ema is not None
        self.write(self.modules.ema, self.ema)


class _AdamW(torch.optim.AdamW):
    """ZeRO steps one parameter group at a time and empties the others, which this one does not look at.

    With a layer-wise learning rate there are dozens of groups: a step of AdamW for each would look at all of them.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["params"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def _mark_leaf_modules(module: nn.Module | None, classes: tuple[type[nn.Module], ...]) -> None:
    from deepspeed.utils import set_z3_leaf_modules

    if module is not None and any(isinstance(child, classes) for child in module.modules()):
        set_z3_leaf_modules(module, list(classes))
