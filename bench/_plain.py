"""What a user would write instead of the service: a plain training loop with the teacher inside, once per student.

The recipe's own teacher, views, losses and modules, one process, torch's fused AdamW and foreach EMA. No Ray, no
DeepSpeed, no checkpoints and no tracking, so it pays for nothing but the work. Views are made in a thread beside
the step, as in the service.

`python -m bench._plain ORDER.json` is one such process; :func:`train` starts and reads them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import UnfairError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from orchestrator.config.schedules import Optimizer
    from orchestrator.training.task import Modules

WARM_UP = 4
_POLL_S = 0.02
_PATIENCE_S = 1200.0


@dataclass(frozen=True)
class Order:
    """What one process is to do.

    Attributes:
        stage: the `distill` section, as JSON types.
        student: name of the student.
        recipe, teacher, index: files and folders that the stage would get from the stages before it.
        threads: torch's.
        inline: whether views are made within the step, not beside it: then teacher and student can be told apart.
        folder: where `ready`, `go`, `result.json` and `weights.safetensors` are.
    """

    stage: dict[str, Any]
    student: str
    recipe: str
    teacher: str
    index: str
    threads: int
    inline: bool
    folder: str


@dataclass(frozen=True)
class Done:
    """What a process did, step by step; item *i* is about the moment after step *i*.

    Attributes:
        wall: monotonic clock of the machine, in seconds.
        cpu: processor seconds of the process so far.
        teacher_cpu: of those, what was spent on views and the teacher; of no meaning unless `inline`.
        losses: of the steps.
        weights: file of the student's EMA backbone.
    """

    wall: list[float]
    cpu: list[float]
    teacher_cpu: list[float]
    losses: list[float]
    weights: str


@dataclass(frozen=True)
class Price:
    """Processor seconds of one step, of the one part and the other."""

    teacher_s: float
    student_s: float


class PlainWeights:
    """`orchestrator.training.task.Weights` on whole modules in one process."""

    def __init__(self, modules: Modules) -> None:
        assert modules.ema is not None
        self._from: list[Tensor] = list(modules.trainable.parameters())
        self._into: list[Tensor] = list(modules.ema.requires_grad_(False).parameters())

    def update_ema(self, momentum: float) -> None:
        """See `Weights`."""
        import torch

        with torch.no_grad():
            torch._foreach_lerp_(self._into, self._from, 1.0 - momentum)

    def copy_ema(self, name: str, prefix: str) -> None:
        """No student has a copy that moves."""
        raise AssertionError(name)


class PlainLoop:
    """One student and its teacher."""

    def __init__(self, order: Order) -> None:
        import torch

        from orchestrator.data.rng import derive
        from orchestrator.stages.common.config import ModelRecipe
        from orchestrator.stages.distill.config import Distill
        from orchestrator.stages.distill.step_views import StepViews
        from orchestrator.stages.distill.task import DistillTask, FrozenTeacher
        from orchestrator.teacher_service.payload import VIEWS

        self.config = config = Distill.model_validate(order.stage)
        recipe = ModelRecipe.model_validate_json(Path(order.recipe).read_text())
        # The seeds that the stage gives to its views and to this student, with a pipeline's seed of 0.
        seed = derive(0, config.kind)
        own = derive(seed, order.student)
        teacher, index = Path(order.teacher), Path(order.index)
        self.teacher = FrozenTeacher(
            config, recipe, teacher, partial(StepViews, config, recipe, index, seed, {VIEWS: config.crops})
        )
        torch.set_num_threads(order.threads)
        torch.manual_seed(own % 2**31)
        self.student = config.students[order.student]
        self.task = DistillTask(config, self.student, recipe, teacher, own)
        self.modules = self.task.build("cpu")
        self.weights = PlainWeights(self.modules)
        settings = self.student.optimizer or config.optimizer
        self.settings = settings
        self.optimizer = torch.optim.AdamW(
            _groups(self.modules, settings), lr=settings.lr.peak, betas=settings.betas, fused=True
        )
        self.num_blocks = config.batch_size // config.block_size
        self.inline = order.inline
        self.teacher_s = 0.0

    def step(self, step: int) -> float:
        """One update; returns the loss."""
        import torch
        from torch.nn.utils import clip_grad_norm_

        from orchestrator.teacher_service.payload import TEACHER, VIEWS, block
        from orchestrator.training.task import BlockTensors

        began = time.process_time()
        if not self.inline:
            self.teacher.expect(step + 1)
        parts = self.teacher(step)
        self.teacher_s += time.process_time() - began
        blocks = []
        for index in range(self.num_blocks):
            arrays = {
                name: array
                for part in (TEACHER, VIEWS)
                for name, array in block(parts[part], index, self.num_blocks)[1].items()
            }
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            blocks.append(BlockTensors(step, index, 1.0, tensors))
        total = 0.0
        for each, target in zip(blocks, self.task.targets(blocks, _alone), strict=True):
            loss = self.task.losses(each, target).total / self.num_blocks
            loss.backward()
            total += float(loss.detach())
        if total - total != 0.0:
            raise RuntimeError(f"the loss is not finite at step {step}")
        if self.settings.clip_norm is not None:
            for module in self.modules.trainable.children():
                clip_grad_norm_(module.parameters(), self.settings.clip_norm)
        steps = self.config.steps_of(self.student)
        rate, decay = self.settings.lr.at(step, steps), self.settings.weight_decay.at(step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
            group["weight_decay"] = decay if group["decayed"] else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(step, self.weights, {})
        return total


def train(orders: Sequence[Order]) -> list[Done]:
    """Run all of them at once, each in a process of its own; none goes past its warm-up before all are there.

    Raises:
        UnfairError: one failed, or took too long.
    """
    with ExitStack() as held:
        processes = [held.enter_context(_started(order)) for order in orders]
        _until_all("ready", orders, processes)
        for order in orders:
            (Path(order.folder) / "go").touch()
        _until_all("result.json", orders, processes)
    return [Done(**json.loads((Path(order.folder) / "result.json").read_text())) for order in orders]


def rounds(done: Sequence[Done], prices: Sequence[Price]) -> tuple[float, float]:
    """Wall and processor seconds of a round, one step of every student, while all of them were at work.

    Students may be at different speeds: their steps count by what they cost. A step that is only partly within
    the time that all share counts by its part.
    """
    begin = max(one.wall[WARM_UP] for one in done)
    end = min(one.wall[-1] for one in done)
    costs = [price.teacher_s + price.student_s for price in prices]
    work = sum(
        cost * (_at(one.wall, end) - _at(one.wall, begin)) for one, cost in zip(done, costs, strict=True)
    )
    cpu = sum(_spent(one, end) - _spent(one, begin) for one in done)
    count = work / sum(costs)
    return (end - begin) / count, cpu / count


def price(done: Done) -> Price:
    """Of a process that had the machine to itself and made its views within the step."""
    steps = len(done.wall) - 1 - WARM_UP
    teacher = (done.teacher_cpu[-1] - done.teacher_cpu[WARM_UP]) / steps
    return Price(teacher, (done.cpu[-1] - done.cpu[WARM_UP]) / steps - teacher)


def own_round_s(done: Done) -> float:
    """Wall seconds of one step of a process that had the machine to itself."""
    return (done.wall[-1] - done.wall[WARM_UP]) / (len(done.wall) - 1 - WARM_UP)


def weights_of(done: Done) -> dict[str, Tensor]:
    """The student's EMA backbone, by the names that the stage exports."""
    from safetensors.torch import load_file

    return dict(load_file(done.weights))


def _at(wall: Sequence[float], moment: float) -> float:
    """How many steps were done at that moment, with the part of the one under way."""
    import numpy as np

    return float(np.interp(moment, wall, range(len(wall))))


def _spent(done: Done, moment: float) -> float:
    import numpy as np

    return float(np.interp(moment, done.wall, done.cpu))


def _started(order: Order) -> subprocess.Popen[bytes]:
    folder = Path(order.folder)
    folder.mkdir(parents=True)
    path = folder / "order.json"
    path.write_text(json.dumps(asdict(order)))
    command = [sys.executable, "-m", "bench._plain", str(path)]
    return subprocess.Popen(command, stdout=sys.stderr, cwd=Path(__file__).parents[1])


def _until_all(file: str, orders: Sequence[Order], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not all((Path(order.folder) / file).exists() for order in orders):
        failed = [one.args for one in processes if one.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            raise UnfairError(f"a plain loop failed: {failed or 'too slow'}")
        time.sleep(_POLL_S)


def _groups(modules: Modules, settings: Optimizer) -> list[dict[str, Any]]:
    """As the engine's: vectors and scalars are never decayed, and layers have rates of their own."""
    return [
        {
            "params": [param],
            "weight_decay": 0.0,
            "decayed": param.ndim > 1,
            "lr_scale": modules.lr_scales.get(name, 1.0),
        }
        for name, param in modules.trainable.named_parameters()
    ]


def _alone(tensor: Tensor) -> Tensor:
    """The sum over workers, of which there is one."""
    return tensor


def _run(order: Order) -> None:
    from safetensors.torch import save_file

    folder = Path(order.folder)
    loop = PlainLoop(order)
    wall, cpu, teacher_cpu, losses = [], [], [], []
    num_steps = loop.config.steps_of(loop.student)
    for step in range(num_steps):
        losses.append(loop.step(step))
        if step == WARM_UP:
            (folder / "ready").touch()
            while not (folder / "go").exists():
                time.sleep(_POLL_S)
        wall.append(time.monotonic())
        cpu.append(time.process_time())
        teacher_cpu.append(loop.teacher_s)
    ema: nn.Module | None = loop.modules.ema
    assert ema is not None
    weights = {
        name.removeprefix("backbone."): value.contiguous()
        for name, value in ema.state_dict().items()
        if name.startswith("backbone.")
    }
    save_file(weights, folder / "weights.safetensors")
    done = Done(wall, cpu, teacher_cpu, losses, str(folder / "weights.safetensors"))
    partial_file = folder / "result.json.partial"
    partial_file.write_text(json.dumps(asdict(done)))
    partial_file.rename(folder / "result.json")


def order_of(values: Mapping[str, Any]) -> Order:
    """From its JSON."""
    return Order(**values)


if __name__ == "__main__":
    _run(order_of(json.loads(Path(sys.argv[1]).read_text())))
