"""One worker of a job without Ray: `python worker.py SPEC.json RANK`. Its figures go to `figures` of the spec."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.elastic.job import Job
from orchestrator.elastic.loop import train
from orchestrator.elastic.zero import import_deepspeed
from orchestrator.spec import Elastic
from orchestrator.stages.gram_anchor import GramAnchor
from orchestrator.stages.pretrain import Pretrain
from orchestrator.stages.selfsup import ModelRecipe, SelfSupervised
from orchestrator.stages.tasks.ssl import SelfSupervisedTask, ssl_blocks


class Recorder:
    """A line that keeps the figures and asks the group to yield after a number of steps."""

    def __init__(self, stop_after: int | None) -> None:
        self.stop_after = stop_after
        self.figures: list[tuple[int, dict[str, float]]] = []
        self.done = 0

    def phase(self, name: str) -> None: ...

    def report(self, step: int, figures: dict[str, float], stall_s: float) -> None:
        self.figures.append((step, figures))

    def recorded(self, step: int) -> bool:
        return True

    def saved(self, step: int, figures: dict[str, float]) -> None: ...

    def trouble(self, what: str) -> None:
        raise AssertionError(what)

    def yield_requested(self) -> bool:
        self.done += 1
        return self.stop_after is not None and self.done >= self.stop_after


def make_job(spec: dict[str, Any]) -> Job:
    kind: type[SelfSupervised] = {"pretrain": Pretrain, "gram_anchor": GramAnchor}[spec["config"]["kind"]]
    config = kind.model_validate(spec["config"])
    recipe = ModelRecipe.model_validate(spec["recipe"])
    gram = Path(spec["gram"]) if spec.get("gram") else None
    return Job(
        name="test",
        task=partial(SelfSupervisedTask, config, recipe, 7, gram),
        blocks=partial(ssl_blocks, config, recipe, Path(spec["index"]), 7),
        num_blocks=config.batch_size // config.block_size,
        num_steps=config.steps,
        optimizer=config.optimizer,
        zero_stage=spec.get("zero_stage", 3),
        precision="fp32",
        work=Path(spec["work"]),
        seed=0,
        elastic=Elastic(checkpoint_every_s=spec.get("checkpoint_every_s", 1e9)),
        start_from=Path(spec["start_from"]) if spec.get("start_from") else None,
    )


def main() -> None:
    spec, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{spec['rendezvous']}", rank=rank, world_size=spec["world"]
    )
    import_deepspeed().init_distributed("gloo", dist_init_required=False, verbose=False)
    recorder = Recorder(spec.get("stop_after"))
    complete = train(make_job(spec), recorder)
    if rank == 0:
        Path(spec["figures"]).write_text(json.dumps({"complete": complete, "figures": recorder.figures}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
