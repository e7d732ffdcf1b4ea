"""How fast this machine runs the models of a first pipeline: measured, not looked up."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.data import dinov2_focus
from orchestrator.data.decode import UnreadableImage, read_rgb
from orchestrator.data.sources.survey import Survey

if TYPE_CHECKING:
    from torch import Tensor

Recipe = Literal["distil", "pretrain"]

_GIB = 2**30
_WARM_S, _TIMED_S = 0.2, 0.5
_DECODED = 8
# Pictures in a forward pass that is timed: a core is busy with few, a GPU is not.
_AT_ONCE = {"cpu": 4, "gpu": 32}


@dataclass(frozen=True)
class TrainingMachine:
    """What trains: CPU cores, memory in GiB, and the GPUs by name with their memory in GiB."""

    cores: int
    memory_gib: float
    gpus: tuple[tuple[str, float], ...] = ()

    @property
    def gpu_names(self) -> str:
        """For a sentence."""
        if not self.gpus:
            return "no GPU"
        name, gib = self.gpus[0]
        return f"{len(self.gpus)} × {name} with {gib:.0f} GiB"

    @property
    def kind(self) -> Literal["cpu", "gpu"]:
        """Which of the two sets of sizes fits."""
        return "gpu" if self.gpus else "cpu"


@dataclass(frozen=True)
class Teacher:
    """A network whose features students learn, with weights that a command fetches.

    Attributes:
        key: under `python -m orchestrator.data.weights`.
        title: for people.
        yaml: its section of the pipeline file.
        folder: of its weights, from where the command runs.
        file: in that folder, which is there if the weights are.
        megabytes: of the download.
        size: pixels a side that it sees.
        numbers: that it answers to one view with.
        needs: a package that must be installed, or None.
    """

    key: str
    title: str
    yaml: str
    folder: str
    file: str
    megabytes: int
    size: int
    numbers: int
    needs: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether the weights are in their folder."""
        return (Path(self.folder) / self.file).is_file()

    @property
    def command(self) -> str:
        """What fetches the weights."""
        return f"python -m orchestrator.data.weights {self.key} {self.folder}"


@dataclass(frozen=True)
class Sizes:
    """Models, and pixels of what they see, for one kind of machine.

    Attributes:
        teacher_size: pixels a side of what the teachers are shown.
        size: pixels a side of what is trained sees.
        pretrained: the model of a pipeline without teachers.
        lr: the peak learning rate of what is trained.
        own_lr: that of a student which learns better at another one.
    """

    students: Mapping[str, str]
    pretrained: str
    teacher_size: int
    focus_size: int
    size: int
    local_size: int
    batch: int
    block: int
    lr: float
    own_lr: Mapping[str, float] = field(default_factory=dict)


SIZES: Mapping[str, Sizes] = {
    "cpu": Sizes(
        students={"vit": "vit_nano", "convnext": "convnext_mini"},
        pretrained="vit_nano",
        teacher_size=128,
        focus_size=112,
        size=64,
        local_size=32,
        batch=32,
        block=16,
        lr=2e-3,
        # docs/headless.md has the scores at both rates.
        own_lr={"convnext": 4e-3},
    ),
    "gpu": Sizes(
        students={"vit": "vit_s", "convnext": "convnext_t"},
        pretrained="vit_s",
        teacher_size=224,
        focus_size=224,
        size=224,
        local_size=96,
        batch=256,
        block=32,
        lr=1e-3,
    ),
}


def teachers(sizes: Sizes) -> tuple[Teacher, ...]:
    """The teachers whose weights package registries carry, the one without further needs first."""
    lite0 = Teacher(
        key="lite0",
        title="EfficientNet-Lite0, trained on ImageNet (4.7 million weights, Apache-2.0)",
        yaml="{module: 'orchestrator.models.efficientnet:lite0', weights: weights/lite0/efficientnet-lite0.pth,\n"
        "                mean: [0.498, 0.498, 0.498], std: [0.502, 0.502, 0.502]}",
        folder="weights/lite0",
        file="efficientnet-lite0.pth",
        megabytes=17,
        size=sizes.teacher_size,
        numbers=1280 * (1 + (-(-sizes.teacher_size // 32)) ** 2),
    )
    focus = Teacher(
        key="dinov2-focus",
        title="A DINOv2 ViT-S/14 that was fine-tuned for saliency (22 million weights, MIT)",
        yaml=f"{{transformers: ./weights/dinov2-focus, size: {sizes.focus_size}, cls_block: 11}}",
        folder="weights/dinov2-focus",
        file=dinov2_focus.WEIGHTS,
        megabytes=90,
        size=sizes.focus_size,
        numbers=384 * (1 + (sizes.focus_size // 14) ** 2),
        needs="transformers",
    )
    return lite0, focus


@dataclass(frozen=True)
class Speed:
    """Seconds that one picture takes on one core, or on one GPU.

    Attributes:
        reading: decoding and cropping it, on a core.
        teaching: all teachers' forward passes.
        learning: forward and backward of each model that is trained, by name.
    """

    reading: float
    teaching: float
    learning: Mapping[str, float]

    @property
    def total(self) -> float:
        """Everything, one after the other."""
        return self.reading + self.teaching + sum(self.learning.values())


def this_machine() -> TrainingMachine:
    """The machine that this runs on."""
    import psutil
    import torch

    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    gpus = tuple((one.name, one.total_memory / _GIB) for one in found)
    return TrainingMachine(len(os.sched_getaffinity(0)), psutil.virtual_memory().total / _GIB, gpus)


def measure(machine: TrainingMachine, sizes: Sizes, chosen: Sequence[Teacher], recipe: Recipe) -> Speed:
    """Run each model for half a second with random weights, on one core or one GPU. `reading` stays 0."""
    import torch

    from orchestrator.models import build, efficientnet

    device, count = "cuda" if machine.gpus else "cpu", _AT_ONCE[machine.kind]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:

        def seconds(net: Any, side: int, *, learns: bool) -> float:
            images_BCHW = torch.zeros(count, 3, side, side, device=device)
            return _seconds(net.to(device), images_BCHW, learns=learns) / count

        # Of the size and shape of DINOv2's ViT-S/14.
        nets: Mapping[str, Callable[[], Any]] = {
            "lite0": lambda: efficientnet.lite0().eval(),
            "dinov2-focus": lambda: build("vit_s", patch_size=14).eval(),
        }
        teaching = sum([seconds(nets[one.key](), one.size, learns=False) for one in chosen], 0.0)
        if recipe == "distil":
            learning = {
                name: seconds(build(model), sizes.size, learns=True) for name, model in sizes.students.items()
            }
        else:
            whole = seconds(build(sizes.pretrained), sizes.size, learns=True)
            local = seconds(build(sizes.pretrained), sizes.local_size, learns=True)
            # Two global and four local views; the EMA teacher looks at the global ones, forward only.
            learning = {"pretrain": 2 * whole * 4 / 3 + 4 * local}
    finally:
        torch.set_num_threads(threads)
    return Speed(0.0, teaching, learning)


def _seconds(net: Any, images_BCHW: Tensor, *, learns: bool) -> float:
    """The least seconds of a forward pass, and of a backward pass if it learns.

    On a core it is processor time, so that what else runs on the machine at the moment does not count.
    """
    import torch

    on_gpu = images_BCHW.device.type == "cuda"
    clock = perf_counter if on_gpu else process_time

    def once() -> float:
        began = clock()
        with torch.set_grad_enabled(learns), torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            out = net(images_BCHW)
            if learns:
                (out.cls.float().mean() + out.patches.float().mean()).backward()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - began

    began = perf_counter()
    while perf_counter() - began < _WARM_S:
        once()
    times = [once()]
    began = perf_counter()
    while perf_counter() - began < _TIMED_S:
        times.append(once())
    return min(times)


def read_seconds(survey: Survey, sizes: Sizes) -> float:
    """The mean processor time in which one of a few pictures is decoded, in seconds."""
    files = survey.listing.files
    count = min(_DECODED, len(files))
    began, done = process_time(), 0
    for number in range(count):
        try:
            read_rgb(
                survey.source.path / files[number * len(files) // count],
                2 * sizes.teacher_size,
                survey.source.max_pixels,
            )
        except UnreadableImage:
            continue
        done += 1
    return (process_time() - began) / max(1, done)
