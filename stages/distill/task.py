"""The two sides of `distill`: the frozen teacher's step, and the task of a student that learns from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.blocks import Block
from orchestrator.objectives.chunked import SoftTargets, chunked_sinkhorn_scaling
from orchestrator.objectives.sinkhorn import sinkhorn_scaling, targets
from orchestrator.stages.common.backbone import see_pixels
from orchestrator.stages.common.config import ModelRecipe, last_snapshot
from orchestrator.stages.common.flops import masked_share
from orchestrator.stages.common.loss_terms import Distillation, TargetProbs
from orchestrator.stages.common.nets import (
    HeadedBackbone,
    block_generator,
    flat_views,
    frozen_backbone,
    learning_rate_scales,
    masked_tokens,
    num_views,
    resize_masks,
    spread_views,
    tune,
    zero3_leaf_modules,
)
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.step_views import StepViews
from orchestrator.stages.distill.student_backbone import backbone_of
from orchestrator.stages.distill.student_config import Student
from orchestrator.teacher_service.payload import TEACHER, samples
from orchestrator.training.device import device_type
from orchestrator.training.export import load_export
from orchestrator.training.task import BlockTensors, Losses, Modules, Reduce, Weights


class FrozenTeacher:
    """What the teacher computes for a step: the heads' bottleneck vectors and the Sinkhorn scaling of the global batch.

    Students rebuild their targets as softmax(bottleneck · prototypes / temperature + scaling), so the logits, a
    hundred times larger, never travel. The vectors have unit length and travel as float16 where the student
    computes in bfloat16, which is coarser.

    Args:
        config: the stage.
        recipe: the teacher's.
        teacher: its artifact's folder.
        make_views: builds what the teacher looks at, and what students fetch besides.
    """

    def __init__(
        self, config: Distill, recipe: ModelRecipe, teacher: Path, make_views: Callable[[], StepViews]
    ) -> None:
        self._config = config
        self._device = device_type()
        if self._device == "cpu":
            torch.set_num_threads(1)
        self._half = in_half(config, self._device)
        self._recipe = recipe
        self._net = _load_teacher(recipe, teacher).to(self._device)
        self._engine: Callable[..., dict[str, Tensor]] = self._net
        self._prototypes = {
            "dino": self._net.dino_head.prototypes.weight,
            "ibot": self._net.ibot_head.prototypes.weight,
        }
        self._patch_size = self._net.patch_size
        self._channels = config.own_channels(recipe.tower.num_channels)
        self._views = make_views()
        self.images_per_step = config.batch_size
        self.images_forwarded = 0
        self._expected: int | None = None

    def expect(self, step: int) -> None:
        """See `Prefetches`: its views are made while the network works on another."""
        self._expected = step

    @torch.inference_mode()
    def __call__(self, step: int) -> dict[str, dict[str, NDArray[Any]]]:
        """The parts of a step: `TEACHER`, and those of the views."""
        blocks = self._views.blocks(step)
        parts = self._views.parts(step)
        if self._expected is not None:
            self._views.expect(self._expected)
        outs = self._forwards(blocks)
        views = blocks[0].arrays["globals"].shape[0]
        dino = self._rounded(torch.cat([out["dino"].unflatten(0, (views, -1)) for out in outs], dim=1))
        ibot = self._rounded(torch.cat([out["ibot"] for out in outs]))
        outputs = {
            **samples(blocks),
            "masks": np.concatenate([block.arrays["masks"] for block in blocks], axis=1),
            "dino": dino.cpu().numpy(),
            "ragged/ibot": ibot.cpu().numpy(),
            "offsets/ibot": np.cumsum([0, *(len(out["ibot"]) for out in outs)]),
            "step/dino_scaling": self._scaling("dino", dino.flatten(0, 1).float()),
            "step/ibot_scaling": self._scaling("ibot", ibot.float()),
        }
        return {TEACHER: outputs, **parts}

    def _forwards(self, blocks: list[Block]) -> list[dict[str, Tensor]]:
        return [self._forward(block) for block in blocks]

    def _rounded(self, codes: Tensor) -> Tensor:
        return codes.half() if self._half else codes.float()

    def _forward(self, block: Block) -> dict[str, Tensor]:
        globals_NCHW = flat_views(torch.from_numpy(block.arrays["globals"])).to(self._device)
        if self._channels is not None:
            globals_NCHW = globals_NCHW[:, list(self._channels)]
        tokens_M = masked_tokens(flat_views(torch.from_numpy(block.arrays["masks"]))).to(self._device)
        height, width = globals_NCHW.shape[-2:]
        self.images_forwarded += len(block.ids)
        grid = (height // self._patch_size, width // self._patch_size)
        # Half of the bytes and twice the speed, in the precision that its students compute in.
        with torch.autocast(self._device, torch.bfloat16, enabled=self._half):
            out = self._engine(globals_NCHW, None, tokens_M, grid, with_logits=False)
        return {name: out[name].float() for name in ("dino", "ibot")}

    def _scaling(self, head: str, codes_NC: Tensor) -> NDArray[Any]:
        temperature, chunk_rows = self._config.teacher_temperature, self._config.chunk_rows
        prototypes_KC = self._prototypes[head]
        if chunk_rows is None:
            scaling_K = sinkhorn_scaling(codes_NC @ prototypes_KC.T, temperature)
        else:
            scaling_K = chunked_sinkhorn_scaling(codes_NC, prototypes_KC, temperature, chunk_rows=chunk_rows)
        scaling: NDArray[Any] = scaling_K.cpu().numpy()
        return scaling


@dataclass(frozen=True)
class DistillTargets:
    """One block's targets, rebuilt from bottleneck vectors: DINO (G, B, K) and iBOT (1, M, K)."""

    dino: TargetProbs
    ibot: TargetProbs
    tokens_M: Tensor


class DistillTask:
    """A student with its EMA; the teacher is only its two prototype layers here."""

    modules: Modules

    def __init__(
        self,
        config: Distill,
        student: Student,
        recipe: ModelRecipe,
        teacher: Path,
        seed: int,
        start: Path | None = None,
    ) -> None:
        """`start` is a file of :func:`orchestrator.stages.common.weights.starting_weights`; None starts at random."""
        self.config, self.student, self.recipe, self.teacher = config, student, recipe, teacher
        self.seed, self.start = seed, start

    def build(self, device: str) -> Modules:
        """See `Task`."""
        student, heads = self.student, self.recipe.heads
        net, ema = (
            HeadedBackbone(
                backbone_of(self.config, student, self.seed), drop_path, heads, student.model_overrides
            )
            for drop_path in (student.drop_path, 0.0)
        )
        if self.start is not None:
            net.backbone.load_state_dict(load_export(self.start, "backbone."))
        net, ema = net.to(device), ema.to(device)
        ema.load_state_dict(net.state_dict())
        for each in (net, ema):
            tune(each, self.config)
            see_pixels(each.backbone, self.recipe.pixels)
        weights = load_export(last_snapshot(self.teacher))
        self.dino_KC = weights["dino_head.prototypes.weight"].to(device)
        self.ibot_KC = weights["ibot_head.prototypes.weight"].to(device)
        self.patch_size = net.patch_size
        side = self.config.crops.global_size // self.recipe.tower.patch_size
        self.grid = (side, side)
        optimizer = self.student.optimizer or self.config.optimizer
        self.modules = Modules(
            net,
            ema=ema,
            lr_scales=learning_rate_scales(net, optimizer),
            frozen_steps=frozen_backbone(net, student.freeze_backbone_steps),
            zero3_leaf_modules=zero3_leaf_modules(self.student.model),
        )
        return self.modules

    def prepare_step(self, step: int) -> None:
        """Nothing here depends on the step."""

    @torch.no_grad()
    def targets(self, blocks: Sequence[BlockTensors], reduce: Reduce) -> list[DistillTargets]:
        """The teacher's targets: its last layers on its bottleneck vectors, with its scaling of the whole batch."""
        result = []
        for block in blocks:
            tensors = block.tensors
            dino = self._target_probs(tensors["dino"], self.dino_KC, tensors["dino_scaling"])
            ibot = self._target_probs(tensors["ibot"][None], self.ibot_KC, tensors["ibot_scaling"])
            result.append(DistillTargets(dino, ibot, masked_tokens(flat_views(tensors["masks"]))))
        return result

    def _target_probs(self, codes_TNC: Tensor, prototypes_KC: Tensor, log_v_K: Tensor) -> TargetProbs:
        temperature = self.config.teacher_temperature
        codes_TNC = codes_TNC.to(prototypes_KC.dtype)
        if self.config.chunk_rows is None:
            return targets(codes_TNC @ prototypes_KC.T, temperature, log_v_K)
        return SoftTargets(codes_TNC, prototypes_KC, log_v_K, temperature)

    def losses(self, block: BlockTensors, target: DistillTargets) -> Losses:
        """DINO, iBOT and KoLeo of one block."""
        config, tensors = self.config, block.tensors
        globals_NCHW = flat_views(tensors["globals"])
        masks_NP = flat_views(tensors["masks"])
        height, width = globals_NCHW.shape[-2:]
        own = (height // self.patch_size, width // self.patch_size)
        distillation = Distillation(
            target.dino,
            target.ibot,
            target.tokens_M,
            num_patches=masks_NP.shape[1],
            num_views=num_views(tensors),
            local_weight=config.local_weight,
            ibot_weight=config.ibot_weight,
            temperature=config.student_temperature,
            chunk_rows=config.chunk_rows,
        )
        out = self.modules.trainable(
            globals_NCHW,
            flat_views(tensors["locals"]) if "locals" in tensors else None,
            target.tokens_M,
            self.grid,
            resize_masks(masks_NP, self.grid, own) if self.student.sees_masks else None,
            block_generator(self.seed, block.step, block.index),
            scores=distillation.scores(),
        )
        terms = distillation.terms(out)
        views_GBD = out["cls"].unflatten(0, (len(tensors["globals"]), -1))
        spread = config.koleo_weight * spread_views(views_GBD, config.koleo_views, config.koleo_group)
        return Losses(torch.stack([*terms.parts, spread]).sum(), {**terms.metrics, "koleo": spread})

    def after_step(self, step: int, weights: Weights, metrics: Mapping[str, float]) -> None:
        """The student's own EMA, which is what gets exported."""
        weights.update_ema(self.config.ema_of(self.student).at(step, self.config.steps_of(self.student)))


def _load_teacher(recipe: ModelRecipe, folder: Path) -> HeadedBackbone:
    net = HeadedBackbone(recipe.model, 0.0, recipe.heads, recipe.model_overrides)
    net.load_state_dict(load_export(last_snapshot(folder)))
    see_pixels(net.backbone, recipe.pixels)
    return net.requires_grad_(False).eval()


def in_half(config: Distill, device: str) -> bool:
    """Whether the teacher computes in bfloat16 and its outputs travel as float16."""
    if config.precision != "auto":
        return config.precision == "bf16"
    return device != "cpu" and torch.cuda.is_bf16_supported()


def bytes_per_image(config: Distill, recipe: ModelRecipe, device: str = "cpu") -> float:
    """Bytes of the teacher's outputs for one image, on average."""
    heads, crops = recipe.heads, config.crops
    patches = (crops.global_size // recipe.tower.patch_size) ** 2
    num_views = config.block_size * crops.num_global
    masked = masked_share(config.mask_probability, config.mask_ratio, num_views) * patches
    code = 2 if in_half(config, device) else 4
    codes = code * (heads.dino_bottleneck + masked * heads.ibot_bottleneck)
    scaling = 4 * (heads.dino_prototypes + heads.ibot_prototypes) / config.batch_size
    return crops.num_global * (codes + patches) + scaling + 8
