"""DeepSpeed behind one small surface: forward, backward, step, and every weight as a flat named shard.

A shard is this worker's consecutive part of a flattened fp32 parameter, unpadded. ZeRO-3 cuts a parameter of N
elements into ceil(N/W) consecutive pieces, which is how `DTensor` `Shard(0)` cuts a vector of N, so shards save
and load at any worker count without conversion (see `checkpoint.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.config.schedules import Optimizer
from orchestrator.training.checkpoint.partition import Shard, cut, cut_whole, gather
from orchestrator.training.gradient_clipping import Clipper, submodule
from orchestrator.training.skipped_updates import Skips
from orchestrator.training.task import Modules
from orchestrator.training.zero import sum_exactly, zero_config

logger = logging.getLogger("orchestrator")


class Engine:
    """Wraps a task's modules in place and owns their optimiser.

    Args:
        modules: as the task built them; `trainable`, `ema` and `copies` are replaced by callable engines.
        optimizer: AdamW settings.
        zero_stage: 1, 2 or 3 for the trainable module; frozen copies are sharded at stage 3 only.
        precision: `fp32` or `bf16`.
        num_blocks: of a step, on all workers. Its gradient is the mean of theirs; every worker makes the same number of
            backward passes, padding included.
        exact: sum gradients in float64 (ZeRO-3 only), so that an update does not depend on the number of workers.
    """

    def __init__(
        self,
        modules: Modules,
        optimizer: Optimizer,
        *,
        zero_stage: int,
        precision: str,
        num_blocks: int,
        exact: bool = False,
    ) -> None:
        import deepspeed

        world = dist.get_world_size()
        # What makes a mean of DeepSpeed's sums, which are means over workers unless they are exact. It multiplies the
        # whole sum: a factor of each block's loss would be rounded into its gradient, for each number of workers anew.
        self._scale = (1 if exact else world) / num_blocks

        self.modules = modules
        self.zero_stage = zero_stage
        # Any: DeepSpeed hangs its `ds_…` attributes on the parameters.
        self._params: dict[str, Any] = dict(modules.trainable.named_parameters())
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        num_trained = sum(param.numel() for param in self._params.values() if param.requires_grad)
        config = zero_config(zero_stage, precision, -(-num_blocks // world), num_trained)
        if zero_stage == 3 and modules.zero3_leaf_modules:
            for module in (
                modules.trainable,
                modules.ema,
                *modules.copies.values(),
                *modules.frozen.values(),
            ):
                _mark_whole(module, modules.zero3_leaf_modules)
        self._optimizer = _AdamW(
            _param_groups(modules),
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
        self._clipper = Clipper(self._engine.optimizer, self._params, optimizer.clip_norm or math.inf)
        if ema_source is not None:
            modules.ema = self._freeze(ema_source, config)
        modules.copies = {name: self._freeze(module, config) for name, module in modules.copies.items()}
        modules.frozen = {name: self._freeze(module, config) for name, module in modules.frozen.items()}
        # Of AdamW, by which its bias correction goes: those that changed the weights.
        self.updates = 0
        self.skips = Skips()
        # Rows of photos that some worker could not read since the stage began: equal on all, and saved in checkpoints.
        self.unreadable: set[int] = set()
        self.ema: dict[str, Tensor] = {}
        if modules.ema is not None:
            self.ema = {shard.name: shard.data.clone() for shard in self.master()}
            self._spread_ema()

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
        """Accumulate the gradient of one block's loss, 0 times that of a padded one; `step` makes the sum a mean."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the block; the update is in `step`

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
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"] if step >= group["frozen_steps"] else 0.0
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        norms = self._clipper.clip(self._scale)
        if all(map(math.isfinite, norms.values())):
            self._engine.step()
        else:
            self.discard()
        self.updates += self.applied
        parts = {f"grad_norm_{name}": norm for name, norm in norms.items()} if len(norms) > 1 else {}
        return {"grad_norm": math.hypot(*norms.values()), **parts}

    @property
    def applied(self) -> bool:
        """Whether the newest `step` changed the weights."""
        return bool(self._engine.was_step_applied())

    def discard(self) -> None:
        """Forget the gradient of all blocks so far, in place of `step`; weights and moments stay as they are."""
        spoilt = self._clipper.spoil()
        self._engine.step()
        assert not self.applied, "DeepSpeed applied a gradient of NaN"
        for gradient in spoilt:
            gradient.zero_()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The trainable module without what it does in training only, such as drop-path; for forwards alone."""
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()

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

    # --- sharded weights ----------------------------------------------------------------------------------

    def master(self) -> Iterator[Shard]:
        """fp32 weights of the trainable module; views at stage 3."""
        yield from self._hp(None)

    def moments(self, key: str) -> Iterator[Shard]:
        """`exp_avg` or `exp_avg_sq`; zeros before the first update."""
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
        """Put shards (unpadded, as :meth:`master` yields them) and AdamW's count of updates in place."""
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

    def update_ema(self, momentum: float) -> None:
        """See :class:`orchestrator.training.task.Weights`."""
        for shard in self.master():
            self.ema[shard.name].lerp_(shard.data, 1.0 - momentum)
        self._spread_ema()

    def _spread_ema(self) -> None:
        assert self.modules.ema is not None
        self.write(self.modules.ema, self.ema)

    def copy_ema(self, name: str, prefix: str) -> None:
        """See :class:`orchestrator.training.task.Weights`."""
        part = {key.removeprefix(prefix): value for key, value in self.ema.items() if key.startswith(prefix)}
        self.write(self.modules.copies[name], part)

    def write(self, module: nn.Module, shards: Mapping[str, Tensor]) -> None:
        """Overwrite a frozen module's weights from fp32 shards, in its own precision."""
        with torch.no_grad():
            for name, param in _named_parameters(module):
                if name not in shards:
                    continue
                if hasattr(param, "ds_tensor"):
                    param.ds_tensor[: shards[name].numel()].copy_(shards[name])
                else:
                    param.copy_(gather(shards[name], param.numel()).view(param.shape))

    def read(self, module: nn.Module) -> Iterator[Shard]:
        """A frozen module's weights as fp32 shards."""
        for name, param in _named_parameters(module):
            if hasattr(param, "ds_tensor"):
                yield cut(name, param.ds_tensor.detach().float(), param.ds_numel, param.ds_shape)
            else:
                yield cut_whole(name, param.float())

    def full_ema(self, prefix: str = "") -> dict[str, Tensor]:
        """The EMA below `prefix` (or the weights, without an EMA), whole and in fp32; collective."""
        shards = ((s, self.ema.get(s.name, s.data)) for s in self.master())
        return {
            shard.name.removeprefix(prefix): gather(data, shard.numel).view(shard.shape).cpu()
            for shard, data in shards
            if shard.name.startswith(prefix)
        }


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


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Of the module inside a DeepSpeed engine, or of the module itself."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, nn.Module)
    yield from inner.named_parameters()


def _mark_whole(module: nn.Module | None, classes: tuple[type[nn.Module], ...]) -> None:
    from deepspeed.utils import set_z3_leaf_modules

    if module is not None and any(isinstance(child, classes) for child in module.modules()):
        set_z3_leaf_modules(module, list(classes))


def _param_groups(modules: Modules) -> list[dict[str, Any]]:
    """AdamW groups by submodule (for :class:`Clipper`), learning-rate factor, frozen steps and decay.

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
