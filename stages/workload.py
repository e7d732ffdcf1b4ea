"""What a training stage computes and holds, from its config alone: for `orchestrator plan`, without data or torch.

Operations count 2 a multiply-add; a backward pass counts twice its forward. Left out, as below one per cent at
paper scale: losses, Gram matrices, optimiser, augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from statistics import fmean
from typing import Literal, cast

from orchestrator.data.views import CropConfig
from orchestrator.models.configs import Config, ViTConfig
from orchestrator.models.cost import forward_flops, head_flops, head_params, num_params
from orchestrator.models.presets import preset
from orchestrator.stages.align_text import AlignText
from orchestrator.stages.base import Stage, TrainStage
from orchestrator.stages.distill import Distill
from orchestrator.stages.pretrain import Pretrain
from orchestrator.stages.selfsup import Heads, SelfSupervised

Kept = Literal["trained", "ema", "frozen"]
_BACKWARD = 2


@dataclass(frozen=True)
class Net:
    """A network that takes part in a step.

    Attributes:
        kept: `trained` has gradients and moments, `ema` an fp32 average and the copy that computes, `frozen` weights.
        unit: parameters of the largest part that ZeRO-3 fetches at once.
        depth, dim: of the tower whose activations a backward pass needs; 0 where there is none.
        tokens: of one image's views, through the tower.
        width: hidden width of a block's feed-forward over `dim`.
    """

    name: str
    kept: Kept
    params: int
    unit: int
    depth: int = 0
    dim: int = 0
    tokens: int = 0
    width: float = 4.0


@dataclass(frozen=True)
class Workload:
    """One job: a stage, a student of one, or the teacher they share.

    Attributes:
        name: `stage` or `stage/student`.
        block_size: images that go forward and backward at once.
        flops: operations an image, by part.
        logits: of an image's student and teacher rows, each times its prototypes.
        largest_row: prototypes of the wider head.
    """

    name: str
    steps: int
    batch_size: int
    block_size: int
    nets: tuple[Net, ...]
    flops: Mapping[str, float]
    logits: tuple[float, float] = (0.0, 0.0)
    largest_row: int = 0

    @property
    def flops_per_image(self) -> float:
        """All parts together."""
        return sum(self.flops.values())

    @property
    def total_flops(self) -> float:
        """Of all steps."""
        return self.flops_per_image * self.batch_size * self.steps


Upstream = Mapping[str, Stage]
"""The stages that fill another's inputs, by role, and as `origin` the one where its lineage of backbones began."""


@singledispatch
def workloads(stage: Stage, name: str, upstream: Upstream) -> list[Workload]:
    """The jobs of a stage; none for one that does not train.

    Args:
        stage: its config.
        name: its name in the pipeline.
        upstream: see :data:`Upstream`.
    """
    assert not isinstance(stage, TrainStage), f"{type(stage).__name__} trains, but nobody said what it costs"
    return []


@workloads.register
def _selfsup(stage: SelfSupervised, name: str, upstream: Upstream) -> list[Workload]:
    origin = cast("Pretrain", upstream.get("origin", stage))
    config, heads = preset(origin.model), origin.heads
    views = stage.views()
    taken = 1 - origin.drop_path
    masked = _masked(stage.mask_probability, stage.mask_ratio)
    student = _towers(config, views, taken)
    student_heads = _heads(config, heads, views, masked)
    nets = [
        _tower("student", "trained", config, heads, views),
        _tower("EMA teacher", "ema", config, heads, ()),
    ]
    flops = {
        "student": (1 + _BACKWARD) * student,
        "student heads": (1 + _BACKWARD) * student_heads,
        "EMA teacher": _towers(config, [_globals(view) for view in views])
        + _heads(config, heads, [_globals(view) for view in views], masked),
    }
    if stage.gram is not None:
        nets.append(_tower("Gram teacher", "frozen", config, None, ()))
        flops["Gram teacher"] = _mean(
            views, lambda crops: crops.num_global * _square(config, crops.gram_size or crops.global_size)
        )
    return [
        Workload(
            name,
            stage.steps,
            stage.batch_size,
            stage.block_size,
            tuple(nets),
            flops,
            _logits(config, heads, views, masked),
            _largest_row(heads),
        )
    ]


@workloads.register
def _distill(stage: Distill, name: str, upstream: Upstream) -> list[Workload]:
    if stage.features is not None:
        return _distill_features(stage, name, upstream)
    origin = cast("Pretrain", upstream["origin"])
    config, heads = preset(origin.model), origin.heads
    views: Views = [(1.0, stage.crops)]
    masked = _masked(stage.mask_probability, stage.mask_ratio)
    only_globals = [_globals(view) for view in views]
    teacher = Workload(
        f"{name}/teacher",
        stage.steps,
        stage.batch_size,
        stage.block_size,
        (_tower("teacher", "frozen", config, heads, ()),),
        {"teacher": _towers(config, only_globals) + _heads(config, heads, only_globals, masked)},
    )
    students = []
    for student_name, student in stage.students.items():
        own, seen = preset(student.model), [(1.0, stage.crops_of(student))]
        forward = _towers(own, seen, 1 - student.drop_path) + _heads(own, heads, seen, masked)
        students.append(
            Workload(
                f"{name}/{student_name}",
                stage.steps_of(student),
                stage.batch_size,
                stage.block_size,
                (
                    _tower("student", "trained", own, heads, seen),
                    _tower("EMA", "ema", own, heads, ()),
                ),
                {"student": (1 + _BACKWARD) * forward},
                _logits(own, heads, seen, masked),
                _largest_row(heads),
            )
        )
    return [teacher, *students]


def _distill_features(stage: Distill, name: str, upstream: Upstream) -> list[Workload]:
    """From backbones without heads. One from elsewhere is not known before it is opened, so it is not counted."""

    def work(part: str, steps: int, nets: tuple[Net, ...], flops: Mapping[str, float]) -> Workload:
        return Workload(f"{name}/{part}", steps, stage.batch_size, stage.block_size, nets, flops)

    views: Views = [(1.0, stage.crops)]
    found = []
    if stage.features is not None and stage.features.uses_own:
        config = preset(cast("Pretrain", upstream["origin"]).model)
        flops = _towers(config, [_globals(view) for view in views])
        frozen = (_tower("teacher", "frozen", config, None, ()),)
        found.append(work("teacher", stage.steps, frozen, {"teacher": flops}))
    for student_name, student in stage.students.items():
        own, seen = preset(student.model), [(1.0, stage.crops_of(student))]
        nets = (_tower("student", "trained", own, None, seen), _tower("EMA", "ema", own, None, ()))
        forward = _towers(own, seen, 1 - student.drop_path)
        flops_of = {"student": (1 + _BACKWARD) * forward}
        found.append(work(student_name, stage.steps_of(student), nets, flops_of))
    return found


@workloads.register
def _align(stage: AlignText, name: str, upstream: Upstream) -> list[Workload]:
    tower_stage = upstream["tower"]
    origin = cast("Pretrain", upstream["origin"])
    if isinstance(tower_stage, Distill):
        chosen = stage.student or next(iter(tower_stage.students))
        config, trained_at = preset(tower_stage.students[chosen].model), tower_stage.crops.global_size
    else:
        config, trained_at = preset(origin.model), cast("SelfSupervised", tower_stage).crops.global_size
    size = stage.image_size or trained_at
    tokens = _tokens(config, size)
    dim = config.dim if isinstance(config, ViTConfig) else config.dims[-1]
    block = ViTConfig(dim=dim, depth=stage.num_blocks, num_heads=max(1, dim // 64), ffn="swiglu",
                      ffn_hidden=-(-8 * dim // 24) * 8, num_storage_tokens=0)  # fmt: skip
    text = ViTConfig(dim=stage.text.dim, depth=stage.text.depth, num_heads=stage.text.num_heads)
    aligner_flops = _blocks(block, tokens) * (1 - stage.drop_path) + 4 * dim * stage.output_dim
    text_flops = _blocks(text, stage.context) + 2 * stage.text.dim * stage.output_dim
    text_params = _block_params(text) * text.depth + stage.text.dim * (
        stage.vocab_size + stage.context + stage.output_dim
    )
    aligner_params = _block_params(block) * block.depth + 2 * dim * stage.output_dim
    # Embedded twice: once without gradients for the whole batch's columns, once with them.
    passes = 2 + _BACKWARD
    nets = (
        Net("vision tower", "frozen", num_params(config), _unit(config)),
        Net("aligner", "trained", aligner_params, _block_params(block), block.depth, dim, tokens, 8.0),
        Net("text tower", "trained", text_params, stage.text.dim * stage.vocab_size, text.depth,
            stage.text.dim, stage.context),
    )  # fmt: skip
    flops = {
        "vision tower": _square(config, size),
        "aligner": passes * aligner_flops,
        "text tower": passes * text_flops,
    }
    return [Workload(name, stage.steps, stage.batch_size, stage.block_size, nets, flops)]


# --- views ----------------------------------------------------------------------------------------------------

Views = Sequence[tuple[float, CropConfig]]
"""Sizes that a step may have, with their shares."""


def _globals(view: tuple[float, CropConfig]) -> tuple[float, CropConfig]:
    return view[0], view[1].model_copy(update={"num_local": 0})


def _mean(views: Views, value: Callable[[CropConfig], float]) -> float:
    """The mean of a figure of the views, by their shares."""
    return fmean([value(crops) for _, crops in views], [share for share, _ in views])


def _masked(probability: float, ratio: tuple[float, float]) -> float:
    """Share of a global view's patches that are masked, on average."""
    return probability * (ratio[0] + ratio[1]) / 2


# --- operations -----------------------------------------------------------------------------------------------


def _square(config: Config, size: int) -> float:
    return float(forward_flops(config, size, size))


def _towers(config: Config, views: Views, taken: float = 1.0) -> float:
    """Forward of all views of an image; drop-path takes a share of the rows through each block."""

    def of(crops: CropConfig) -> float:
        flops = crops.num_global * _square(config, crops.global_size)
        return flops + (crops.num_local * _square(config, crops.local_size) if crops.num_local else 0.0)

    return taken * _mean(views, of)


def _heads(config: Config, heads: Heads, views: Views, masked: float) -> float:
    dim = _dim(config)
    dino = head_flops(dim, heads.hidden, heads.dino_bottleneck, heads.dino_prototypes)
    ibot = head_flops(dim, heads.hidden, heads.ibot_bottleneck, heads.ibot_prototypes)

    def of(crops: CropConfig) -> float:
        return dino * (crops.num_global + crops.num_local) + ibot * masked * _patches(config, crops)

    return _mean(views, of)


def _logits(config: Config, heads: Heads, views: Views, masked: float) -> tuple[float, float]:
    """Logits of an image: the student's and the teacher's."""

    def of(crops: CropConfig, rows: int) -> float:
        tokens = masked * _patches(config, crops)
        return rows * heads.dino_prototypes + tokens * heads.ibot_prototypes

    student = _mean(views, lambda crops: of(crops, crops.num_global + crops.num_local))
    return student, _mean(views, lambda crops: of(crops, crops.num_global))


def _largest_row(heads: Heads) -> int:
    return max(heads.dino_prototypes, heads.ibot_prototypes)


def _patches(config: Config, crops: CropConfig) -> int:
    return crops.num_global * (crops.global_size // config.patch_size) ** 2


def _tokens(config: Config, size: int) -> int:
    prefix = 1 + config.num_storage_tokens if isinstance(config, ViTConfig) else 1
    return prefix + (size // config.patch_size) ** 2


def _dim(config: Config) -> int:
    return config.dim if isinstance(config, ViTConfig) else config.dims[-1]


def _blocks(config: ViTConfig, tokens: int) -> float:
    """Forward of a transformer's blocks on a row of tokens."""
    matrices = _block_params(config)
    return 2.0 * config.depth * (tokens * matrices + 2 * tokens**2 * config.dim)


def _block_params(config: ViTConfig) -> int:
    """Entries of a block's matrices; its vectors are below one in a thousand."""
    hidden = config.ffn_hidden or 4 * config.dim
    return 4 * config.dim**2 + (3 if config.ffn == "swiglu" else 2) * config.dim * hidden


# --- networks -------------------------------------------------------------------------------------------------


def _unit(config: Config) -> int:
    if isinstance(config, ViTConfig):
        return _block_params(config)
    return 8 * config.dims[-1] ** 2


def _tower(name: str, kept: Kept, config: Config, heads: Heads | None, views: Views) -> Net:
    dim = _dim(config)
    params, unit = num_params(config), _unit(config)
    if heads is not None:
        params += head_params(dim, heads.hidden, heads.dino_bottleneck, heads.dino_prototypes)
        params += head_params(dim, heads.hidden, heads.ibot_bottleneck, heads.ibot_prototypes)
        prototypes = (
            heads.dino_bottleneck * heads.dino_prototypes,
            heads.ibot_bottleneck * heads.ibot_prototypes,
        )
        unit = max(unit, *prototypes)
    if not views:
        return Net(name, kept, params, unit)

    def tokens(crops: CropConfig) -> float:
        return crops.num_global * _tokens(config, crops.global_size) + crops.num_local * _tokens(
            config, crops.local_size
        )

    # The largest step decides what fits, not the mean one.
    most = max(tokens(crops) for _, crops in views)
    depth = config.depth if isinstance(config, ViTConfig) else sum(config.depths)
    width = 4.0
    if isinstance(config, ViTConfig):
        hidden = config.ffn_hidden or 4 * config.dim
        width = hidden / config.dim * (2 if config.ffn == "swiglu" else 1)
    return Net(name, kept, params, unit, depth, dim, round(most), width)
