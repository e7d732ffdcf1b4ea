"""What a training stage computes and holds, from its config alone: for `orchestrator plan`, without data or torch.

A student that is a network from elsewhere is built and counted, which needs torch (`stages/distill/network_cost.py`).

Operations count 2 a multiply-add; a backward pass counts twice its forward. Left out, as below one per cent at
paper scale: losses, Gram matrices, optimizer, augmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import NamedTuple, cast

from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError
from orchestrator.models.configs import Config, ViTConfig, swiglu_hidden
from orchestrator.models.cost import head_params, num_params
from orchestrator.stages.align_text.config import AlignText, student_mistake
from orchestrator.stages.base import Stage
from orchestrator.stages.common.config import Heads
from orchestrator.stages.common.flops import (
    Views,
    block_params,
    blocks_flops,
    feature_dim,
    heads_flops,
    largest_row,
    logits_per_image,
    masked_share,
    mean,
    num_tokens,
    only_globals,
    square_flops,
    tower_flops,
)
from orchestrator.stages.common.workload import Kept, Net, Workload
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.network_cost import network_cost
from orchestrator.stages.distill.student_config import Student
from orchestrator.stages.finetune.config import Finetune
from orchestrator.stages.ssl.config import SelfSupervised

_BACKWARD = 2
# Pixels a side of images for weights that do not say what they were trained at.
_SIZE = 224
Upstream = Mapping[str, Stage]
"""The stages that fill another's inputs, by role, and as `origin` the one where its lineage of backbones began."""


@singledispatch
def workloads(stage: Stage, name: str, upstream: Upstream) -> list[Workload]:
    """The jobs of a stage; none for one that does not train, and for a kind from elsewhere that does not say.

    Args:
        stage: its config.
        name: its name in the pipeline.
        upstream: see :data:`Upstream`.
    """
    return []


@workloads.register
def _self_supervised(stage: SelfSupervised, name: str, upstream: Upstream) -> list[Workload]:
    origin = upstream.get("origin", stage).model_recipe()
    if origin is None:
        return []  # of weights that are not there
    config, heads = origin.tower, origin.heads
    views = stage.views()
    taken = 1 - origin.drop_path
    masked = masked_share(stage.mask_probability, stage.mask_ratio, stage.block_size * stage.crops.num_global)
    student = tower_flops(config, views, taken)
    student_heads = heads_flops(feature_dim(config), config.patch_size, heads, views, masked)
    nets = [
        _tower("student", "trained", config, heads, views),
        _tower("EMA teacher", "ema", config, heads, ()),
    ]
    flops = {
        "student": (1 + _BACKWARD) * student,
        "student heads": (1 + _BACKWARD) * student_heads,
        "EMA teacher": tower_flops(config, [only_globals(view) for view in views])
        + heads_flops(
            feature_dim(config), config.patch_size, heads, [only_globals(view) for view in views], masked
        ),
    }
    if stage.gram is not None:
        nets.append(_tower("Gram teacher", "frozen", config, None, ()))
        flops["Gram teacher"] = mean(
            views, lambda crops: crops.num_global * square_flops(config, crops.gram_size or crops.global_size)
        )
    return [
        Workload(
            name,
            stage.steps,
            stage.batch_size,
            stage.block_size,
            tuple(nets),
            flops,
            logits_per_image(config.patch_size, heads, views, masked),
            largest_row(heads),
        )
    ]


@workloads.register
def _distill(stage: Distill, name: str, upstream: Upstream) -> list[Workload]:
    if stage.features is not None:
        return _distill_features(stage, name, upstream)
    origin = upstream["origin"].model_recipe()
    if origin is None:
        return []
    config, heads = origin.tower, origin.heads
    views: Views = [(1.0, stage.crops)]
    masked = masked_share(stage.mask_probability, stage.mask_ratio, stage.block_size * stage.crops.num_global)
    by_teacher = [only_globals(view) for view in views]
    teacher = Workload(
        f"{name}/teacher",
        stage.steps,
        stage.batch_size,
        stage.block_size,
        (_tower("teacher", "frozen", config, heads, ()),),
        {
            "teacher": tower_flops(config, by_teacher)
            + heads_flops(feature_dim(config), config.patch_size, heads, by_teacher, masked)
        },
    )
    students = []
    for student_name, student in stage.students.items():
        found, seen = _student(stage, student, heads), [(1.0, stage.crops_of(student))]
        if found is None:
            continue
        forward = found.forward + heads_flops(found.dim, found.patch_size, heads, seen, masked)
        students.append(
            Workload(
                f"{name}/{student_name}",
                stage.steps_of(student),
                stage.batch_size,
                stage.block_size,
                found.nets,
                {"student": (1 + _BACKWARD) * forward},
                logits_per_image(found.patch_size, heads, seen, masked),
                largest_row(heads),
            )
        )
    return [teacher, *students]


def _distill_features(stage: Distill, name: str, upstream: Upstream) -> list[Workload]:
    """From backbones without heads. Those from elsewhere are not known before they are opened, so they do not count."""

    def work(part: str, steps: int, nets: tuple[Net, ...], flops: Mapping[str, float]) -> Workload:
        return Workload(f"{name}/{part}", steps, stage.batch_size, stage.block_size, nets, flops)

    views: Views = [(1.0, stage.crops)]
    found = []
    if stage.features is not None and stage.features.uses_own:
        origin = upstream["origin"].model_recipe()
        if origin is None:
            return []
        flops = tower_flops(origin.tower, [only_globals(view) for view in views])
        frozen = (_tower("teacher", "frozen", origin.tower, None, ()),)
        found.append(work("teacher", stage.steps, frozen, {"teacher": flops}))
    for student_name, student in stage.students.items():
        one = _student(stage, student, None)
        if one is None:
            continue
        flops_of = {"student": (1 + _BACKWARD) * one.forward}
        found.append(work(student_name, stage.steps_of(student), one.nets, flops_of))
    return found


class _StudentCost(NamedTuple):
    """What a student's backbone costs: operations of its forward pass on an image's views, and what is held."""

    forward: float
    nets: tuple[Net, Net]
    dim: int
    patch_size: int


def _student(stage: Distill, student: Student, heads: Heads | None) -> _StudentCost | None:
    """By the formulas of our models, or counted of a network from elsewhere; None of one that cannot be built."""
    own, crops = student.tower, stage.crops_of(student)
    if not stage.sees_locals:
        crops = crops.model_copy(update={"num_local": 0})
    if own is not None:
        seen = [(1.0, crops)]
        nets = (_tower("student", "trained", own, heads, seen), _tower("EMA", "ema", own, heads, ()))
        return _StudentCost(
            tower_flops(own, seen, 1 - student.drop_path), nets, feature_dim(own), own.patch_size
        )
    num_local = crops.num_local
    try:
        spec = student.network
    except ValueError:
        return None
    assert spec is not None
    cost = network_cost(spec, crops.global_size, (crops.local_size,) if num_local else ())
    if cost is None:
        return None

    def of_views(by_size: Mapping[int, float]) -> float:
        local = num_local * by_size[crops.local_size] if num_local else 0.0
        return crops.num_global * by_size[crops.global_size] + local

    params, unit = cost.params, cost.unit
    if heads is not None:
        params += _head_params(cost.dim, heads)
        unit = max(unit, *_prototypes(heads))
    held = of_views(cost.activation_bytes)
    trained = Net("student", "trained", params, unit, activation_bytes=held)
    return _StudentCost(
        of_views(cost.flops), (trained, Net("EMA", "ema", params, unit)), cost.dim, cost.patch_size
    )


@workloads.register
def _align(stage: AlignText, name: str, upstream: Upstream) -> list[Workload]:
    tower_stage = upstream["tower"]
    if isinstance(tower_stage, Distill):
        if mistake := student_mistake(sorted(tower_stage.students), stage.student):
            raise UserError(mistake.what, where=f"stages.{name}.student", hint=mistake.hint)
        chosen = stage.student or next(iter(tower_stage.students))
        found = tower_stage.students[chosen].tower
        if found is None:
            return []  # refused by the stage itself
        config, trained_at = found, tower_stage.crops.global_size
    else:
        origin = upstream["origin"].model_recipe()
        if origin is None:
            return []
        config, trained_at = origin.tower, cast("SelfSupervised", tower_stage).crops.global_size
    size = stage.image_size or trained_at
    tokens = num_tokens(config, size)
    dim = config.dim if isinstance(config, ViTConfig) else config.dims[-1]
    block = ViTConfig(dim=dim, depth=stage.num_blocks, num_heads=max(1, dim // 64), ffn="swiglu",
                      ffn_hidden=stage.ffn_hidden or swiglu_hidden(dim), num_storage_tokens=0)  # fmt: skip
    text = ViTConfig(dim=stage.text.dim, depth=stage.text.depth, num_heads=stage.text.num_heads)
    pooled, matrix = 2 * dim, 2 * dim * stage.output_dim
    if stage.projection == "shared":
        matrix = 0 if pooled == stage.output_dim else dim * stage.output_dim // 2
    aligner_flops = blocks_flops(block, tokens) * (1 - stage.drop_path) + 2 * matrix
    text_flops = blocks_flops(text, stage.context) + 2 * stage.text.dim * stage.output_dim
    text_params = block_params(text) * text.depth + stage.text.dim * (
        stage.vocab_size + stage.context + stage.output_dim
    )
    aligner_params = block_params(block) * block.depth + matrix
    # Embedded twice: once without gradients for the whole batch's columns, once with them.
    passes = 2 + _BACKWARD
    nets = (
        Net("vision tower", "frozen", num_params(config), _unit(config)),
        Net("aligner", "trained", aligner_params, block_params(block), block.depth, dim, tokens, 8.0),
        Net("text tower", "trained", text_params, stage.text.dim * stage.vocab_size, text.depth,
            stage.text.dim, stage.context),
    )  # fmt: skip
    flops = {
        "vision tower": square_flops(config, size),
        "aligner": passes * aligner_flops,
        "text tower": passes * text_flops,
    }
    return [Workload(name, stage.steps, stage.batch_size, stage.block_size, nets, flops)]


@workloads.register
def _finetune(stage: Finetune, name: str, upstream: Upstream) -> list[Workload]:
    config = stage.tower(upstream)
    backbone = upstream.get("backbone")
    trained_at = backbone.crops.global_size if isinstance(backbone, (Distill, SelfSupervised)) else _SIZE
    if config is None:
        return []  # of weights that are not there, or a network from elsewhere
    size, dim = stage.image_size or trained_at, feature_dim(config)
    head = stage.task.head_params(dim)
    depth = config.depth if isinstance(config, ViTConfig) else sum(config.depths)
    # Of adapters the gradients of activations are computed, and hardly any of weights.
    passes = {"frozen": 1, "lora": 1 + _BACKWARD // 2, "full": 1 + _BACKWARD}[stage.mode]
    tokens = round(num_tokens(config, size))
    held = (depth, dim, tokens) if stage.mode != "frozen" else ()
    kept: Kept = "trained" if stage.mode == "full" else "frozen"
    nets = [
        Net("backbone", kept, num_params(config), _unit(config), *held),
        Net("head", "trained", head, head),
    ]
    if stage.ema is not None:
        nets.append(
            Net("EMA", "ema", head + (num_params(config) if stage.mode == "full" else 0), _unit(config))
        )
    places = 1 if stage.task.needs_index else tokens
    flops = {"backbone": passes * square_flops(config, size), "head": 6.0 * head * places}
    return [Workload(name, stage.steps, stage.batch_size, stage.block_size, tuple(nets), flops)]


# --- networks -------------------------------------------------------------------------------------------------


def _unit(config: Config) -> int:
    if isinstance(config, ViTConfig):
        return block_params(config)
    return 8 * config.dims[-1] ** 2


def _head_params(dim: int, heads: Heads) -> int:
    return head_params(dim, heads.hidden, heads.dino_bottleneck, heads.dino_prototypes) + head_params(
        dim, heads.hidden, heads.ibot_bottleneck, heads.ibot_prototypes
    )


def _prototypes(heads: Heads) -> tuple[int, int]:
    """Entries of both heads' prototype layers."""
    return (
        heads.dino_bottleneck * heads.dino_prototypes,
        heads.ibot_bottleneck * heads.ibot_prototypes,
    )


def _tower(name: str, kept: Kept, config: Config, heads: Heads | None, views: Views) -> Net:
    dim = feature_dim(config)
    params, unit = num_params(config), _unit(config)
    if heads is not None:
        params += _head_params(dim, heads)
        unit = max(unit, *_prototypes(heads))
    if not views:
        return Net(name, kept, params, unit)

    def tokens(crops: CropConfig) -> float:
        return crops.num_global * num_tokens(config, crops.global_size) + crops.num_local * num_tokens(
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
