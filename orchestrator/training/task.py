"""The contract between one training stage and the loop that trains it.

A task owns modules, losses and what follows a step. It knows nothing of Ray, DeepSpeed, MLflow or storage:
the loop wraps its modules in place (`Modules.trainable` becomes a ZeRO engine with the same call signature)
and hands it `Workers`, what all workers of a step do together, and `Weights`, the few operations on sharded
weights it may need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Reduce = Callable[[Tensor], Tensor]


@dataclass
class Modules:
    """What a task trains and what it only reads.

    Attributes:
        trainable: receives gradients; one call of it per block is one forward.
        ema: same parameters as `trainable`; follows it as an exponential moving average held in fp32 shards.
        copies: frozen modules whose weights change by :meth:`Weights.copy_ema`; saved in checkpoints.
        frozen: modules that never change; rebuilt from their artifact, never saved.
        lr_scales: parameter name → factor on the learning rate (layer-wise decay).
        frozen_steps: parameter name → steps during which it does not move (the prototype layers).
        zero3_leaf_modules: module classes fetched as one unit by ZeRO-3 (transformer blocks).
        state: numbers that decide what the task does next, changed by it in place in `after_step`, equal on all
            workers; saved in checkpoints, and put back after `build`. A new stage begins with what it built.
    """

    trainable: nn.Module
    ema: nn.Module | None = None
    copies: dict[str, nn.Module] = field(default_factory=dict)
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    frozen_steps: Mapping[str, int] = field(default_factory=dict)
    zero3_leaf_modules: tuple[type[nn.Module], ...] = ()
    state: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockTensors:
    """One block on the device: what `data.blocks.Block` holds, as tensors. `weight` is 0 for padding."""

    step: int
    index: int
    weight: float
    tensors: Mapping[str, Tensor]
    num_samples: int = 0


@dataclass(frozen=True)
class Losses:
    """A block's differentiable `total` and the detached metrics worth a curve."""

    total: Tensor
    metrics: Mapping[str, Tensor]


class Workers(Protocol):
    """What all workers of a step do together; every worker makes the same calls in the same order.

    Called, it is a :data:`Reduce`: objectives take it, or its `ring`, as plain functions.

    Attributes:
        exact: results must not depend on the number of workers, to the last bit of a float32.
    """

    exact: bool

    def __call__(self, tensor: Tensor) -> Tensor:
        """The sum over workers."""

    def ring(self, rows: Tensor) -> Iterable[Tensor]:
        """Every worker's rows in turn, the own ones first; to be used up. Rows may differ in number."""


class Weights(Protocol):
    """Operations on sharded weights, for `Task.after_step`."""

    def update_ema(self, momentum: float) -> None:
        """ema ← momentum·ema + (1-momentum)·trainable, in fp32; then into the teacher's own precision."""

    def copy_ema(self, name: str, prefix: str) -> None:
        """Overwrite `Modules.copies[name]` with the EMA of the parameters below `prefix`."""


class Task(Protocol):
    """What one training stage trains. See `docs/adr/0001-shape.md`."""

    modules: Modules

    def build(self, device: str) -> Modules:
        """Make all modules, identically in every worker."""

    def targets(self, blocks: Sequence[BlockTensors], reduce: Workers) -> list[Any]:
        """No-grad targets of all of this worker's blocks of one step, in order."""

    def losses(self, block: BlockTensors, target: Any) -> Losses:
        """The loss of one block."""

    def prepare_step(self, step: int) -> None:
        """Set what depends on the step (loss weights, frozen parts) before its first forward."""

    def after_step(self, step: int, weights: Weights, metrics: Mapping[str, float]) -> None:
        """What follows an update: EMA, refresh of a Gram teacher. `metrics` are the step's, over all workers.

        Not called where the update was skipped, since a gradient was not finite.
        """


@runtime_checkable
class Probing(Protocol):
    """A task that looks at its weights now and then, with samples that it does not train on; see `Job.probe`."""

    def probe(self, done: int, blocks: Sequence[BlockTensors], reduce: Workers) -> dict[str, float]:
        """Figures of the weights after `done` steps, the same on all workers.

        Args:
            done: steps; 0 before the first one.
            blocks: this worker's, in order. Those of weight 0 only pad it, so that every worker has as many.
            reduce: the sum over workers.

        Raises:
            UserError: training is to stop.
        """
