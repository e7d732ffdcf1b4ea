"""`orchestrator` with one stage whose blocks take a given time and hardly any processor.

`python -m bench._paced run FILE` is `orchestrator run FILE`.

Four machines that share two cores do not compute faster than one. Machines of a spot market do: each worker has its own
accelerator. A block that waits in place of computing makes a laptop's workers as independent as theirs, so that a
replay measures the engine and not the contention. Everything but the computing is real.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from orchestrator.config.schedules import Optimizer
from orchestrator.stages.base import Context, TrainStage


class Paced(TrainStage):
    """`steps` steps of `batch_size / block_size` blocks that take `block_s` seconds each."""

    kind: Literal["pretrain"]
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    block_size: int = Field(1, ge=1)
    block_s: float = Field(0.2, ge=0)
    width: int = Field(256, ge=1)

    preload: ClassVar[tuple[str, ...]] = ("bench._paced",)
    outputs: ClassVar[Mapping[str, str]] = {"goodput.json": "the job's account"}

    def run(self, context: Context) -> Mapping[str, float]:
        """Train, and keep the account."""
        from orchestrator.elastic import trainer
        from orchestrator.training.job import Job

        job = Job(
            name=context.name,
            task=partial(PacedTask, self.width, self.block_s),
            blocks=partial(PacedBlocks, self.batch_size // self.block_size),
            num_blocks=self.batch_size // self.block_size,
            num_steps=self.steps,
            optimizer=Optimizer.model_validate({"lr": {"peak": 1e-3}}),
            zero_stage=1,
            precision="fp32",
            work=context.work,
            seed=context.seed,
            elastic=context.elastic,
        )
        figures = trainer.run(job, tracker=context.run, stop=context.stop)
        account = json.loads((context.work / "goodput.json").read_text())
        (context.out / "goodput.json").write_text(json.dumps({"stage": context.name, **account}))
        return figures


class PacedBlocks:
    """Blocks of one number."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def load(self, step: int, index: int) -> Any:
        """The block `index` of `step`."""
        from orchestrator.data.blocks import Block

        ids = np.array([step * self.num_blocks + index])
        return Block(step, index, ids, {"x": np.full((1,), index, np.float32)})


class PacedTask:
    """A linear layer whose loss takes `block_s` seconds."""

    def __init__(self, width: int, block_s: float) -> None:
        self.width, self.block_s = width, block_s

    def build(self, device: str) -> Any:
        """The layer and its EMA."""
        import torch

        from orchestrator.training.task import Modules

        layers = []
        for _ in range(2):
            torch.manual_seed(0)
            layers.append(torch.nn.Linear(self.width, self.width).to(device))
        self.modules = Modules(layers[0], ema=layers[1])
        return self.modules

    def targets(self, blocks: Sequence[Any], reduce: Any) -> list[Any]:
        """None are needed."""
        return [None] * len(blocks)

    def losses(self, block: Any, target: Any) -> Any:
        """Wait; then a loss that has gradients."""
        import torch

        from orchestrator.training.task import Losses

        time.sleep(self.block_s)
        inputs = torch.full((1, self.width), 0.1) + 0.01 * block.tensors["x"]
        total = self.modules.trainable(inputs).square().mean()
        return Losses(total, {"loss": total.detach()})

    def prepare_step(self, step: int) -> None:
        """Nothing depends on the step."""

    def after_step(self, step: int, weights: Any, figures: Any) -> None:
        """The EMA follows."""
        weights.update_ema(0.9)


def main() -> None:
    """The command line, with this stage in place of the real ones."""
    from bench import _paced
    from orchestrator import cli
    from orchestrator.pipeline import load

    replaced: Any = load
    # By its importable name: what is pickled from `__main__` cannot be found by a worker.
    replaced._all_stages = lambda: _paced.Paced
    cli.main()


PIPELINE = Path(__file__).with_name("_paced.yaml")

if __name__ == "__main__":
    main()
