"""The task of `pretrain`, `gram_anchor` and `high_res`: student, EMA teacher and, when anchored, a Gram teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from orchestrator.data.blocks import BlockSource, CropBlocks
from orchestrator.data.index import PhotoIndex
from orchestrator.data.order import SampleOrder
from orchestrator.elastic.export import load_export
from orchestrator.elastic.task import BlockTensors, Losses, Modules, Reduce, Weights
from orchestrator.models import build, normalise, preset, save_pretrained
from orchestrator.objectives.dense_health import cls_patch_cosine, patch_locality
from orchestrator.objectives.gram import gram_loss
from orchestrator.objectives.koleo import koleo
from orchestrator.objectives.sinkhorn import sinkhorn_scaling, targets
from orchestrator.stages.selfsup import ModelRecipe, SelfSupervised
from orchestrator.stages.tasks.nets import (
    HeadedBackbone,
    block_generator,
    distillation_losses,
    flat_views,
    frozen_prototypes,
    learning_rate_scales,
    masked_tokens,
    on_grid,
    whole_modules,
)


@dataclass(frozen=True)
class Targets:
    """One block's no-grad side: DINO targets (G, B, K), iBOT targets (M, K), Gram features, health figures."""

    dino_GBK: Tensor
    ibot_MK: Tensor
    tokens_M: Tensor
    gram_NPD: Tensor | None
    figures: dict[str, Tensor]


class SelfSupervisedTask:
    """DINO + iBOT + KoLeo, with Gram anchoring where the config has it."""

    modules: Modules

    def __init__(
        self, config: SelfSupervised, recipe: ModelRecipe, seed: int, gram_weights: Path | None
    ) -> None:
        self.config, self.recipe, self.seed, self.gram_weights = config, recipe, seed, gram_weights
        self.local_weight = self.gram_weight = 0.0
        self.teacher_temperature = config.teacher_temperature.peak

    def build(self, device: str) -> Modules:
        """See `Task`: student and EMA teacher start equal; the Gram teacher from its snapshot."""
        config, recipe = self.config, self.recipe
        student = HeadedBackbone(recipe.model, recipe.drop_path, recipe.heads).to(device)
        teacher = HeadedBackbone(recipe.model, 0.0, recipe.heads).to(device)
        teacher.load_state_dict(student.state_dict())
        copies: dict[str, nn.Module] = {}
        if self.gram_weights is not None:
            gram = build(recipe.model).to(device)
            gram.load_state_dict(load_export(self.gram_weights, "backbone."))
            copies["gram"] = gram
        self.patch_size = student.patch_size
        self.modules = Modules(
            student,
            ema=teacher,
            copies=copies,
            lr_scales=learning_rate_scales(student, config.optimizer),
            frozen_steps=frozen_prototypes(config.frozen_prototype_steps),
            whole=whole_modules(recipe.model),
        )
        return self.modules

    def prepare_step(self, step: int) -> None:
        """Loss weights and temperature of this step."""
        config = self.config
        self.local_weight = config.local_weight.at(step, config.steps)
        self.teacher_temperature = config.teacher_temperature.at(step, config.steps)
        self.gram_weight = config.gram.weight.at(step, config.steps) if config.gram else 0.0

    @torch.no_grad()
    def targets(self, blocks: Sequence[BlockTensors], reduce: Reduce) -> list[Targets]:
        """Teacher forward a block at a time, then Sinkhorn-Knopp over the global batch of the step."""
        outs = [self._teacher(block) for block in blocks]
        dino_v = self._scaling([out["dino"] for out in outs], blocks, reduce)
        ibot_v = self._scaling([out["ibot"] for out in outs], blocks, reduce)
        result = []
        for block, out in zip(blocks, outs, strict=True):
            num_globals = len(block.tensors["globals"])
            dino = targets(out["dino"], self.teacher_temperature, dino_v).unflatten(0, (num_globals, -1))
            ibot = targets(out["ibot"], self.teacher_temperature, ibot_v)
            result.append(
                Targets(dino, ibot, self._tokens(block), self._gram_features(block), self._health(block, out))
            )
        return result

    def losses(self, block: BlockTensors, target: Targets) -> Losses:
        """All terms of one block."""
        config = self.config
        masks_NP = flat_views(block.tensors["masks"])
        out = self.modules.trainable(
            flat_views(block.tensors["globals"]),
            flat_views(block.tensors["locals"]) if "locals" in block.tensors else None,
            target.tokens_M,
            self._grid(block),
            masks_NP,
            block_generator(self.seed, block.step, block.index),
        )
        terms = distillation_losses(
            out,
            target.dino_GBK,
            target.ibot_MK,
            target.tokens_M,
            num_patches=masks_NP.shape[1],
            local_weight=self.local_weight,
            ibot_weight=config.ibot_weight,
            temperature=config.student_temperature,
        )
        views_GBD = out["cls"].unflatten(0, (len(block.tensors["globals"]), -1))
        views_GBD = views_GBD[:1] if config.koleo_views == "first" else views_GBD
        terms["koleo"] = config.koleo_weight * torch.stack([koleo(view_BD) for view_BD in views_GBD]).sum()
        if target.gram_NPD is not None:
            assert config.gram is not None
            loss = gram_loss(out["patches"], target.gram_NPD, form=config.gram.form)
            terms["gram"] = self.gram_weight * loss
        return Losses(torch.stack(list(terms.values())).sum(), {**terms, **target.figures})

    def after_step(self, step: int, weights: Weights) -> None:
        """EMA; then the Gram teacher takes it when its turn has come."""
        weights.update_ema(self.config.ema.at(step, self.config.steps))
        if self.config.gram and self.config.gram.updates_at(step + 1):
            weights.copy_ema("gram", "backbone.")

    def _teacher(self, block: BlockTensors) -> dict[str, Tensor]:
        assert self.modules.ema is not None
        globals_NCHW = flat_views(block.tensors["globals"])
        out: dict[str, Tensor] = self.modules.ema(globals_NCHW, None, self._tokens(block), self._grid(block))
        return out

    def _scaling(self, logits: list[Tensor], blocks: Sequence[BlockTensors], reduce: Reduce) -> Tensor:
        weights_N = torch.cat(
            [rows.new_full((len(rows),), block.weight) for rows, block in zip(logits, blocks, strict=True)]
        )
        return sinkhorn_scaling(
            torch.cat(logits), self.teacher_temperature, weights_N=weights_N, reduce=reduce
        )

    def _gram_features(self, block: BlockTensors) -> Tensor | None:
        gram = self.modules.copies.get("gram")
        if gram is None:
            return None
        views_NCHW = flat_views(block.tensors.get("gram", block.tensors["globals"]))
        return on_grid(gram(normalise(views_NCHW)), views_NCHW.shape[-2:], self.patch_size, self._grid(block))

    def _health(self, block: BlockTensors, out: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "cls_patch_cosine": cls_patch_cosine(out["cls"], out["patches"]),
            "patch_locality": patch_locality(out["patches"], self._grid(block)),
        }

    def _tokens(self, block: BlockTensors) -> Tensor:
        return masked_tokens(flat_views(block.tensors["masks"]))

    def _grid(self, block: BlockTensors) -> tuple[int, int]:
        height, width = block.tensors["globals"].shape[-2:]
        return height // self.patch_size, width // self.patch_size


def ssl_blocks(config: SelfSupervised, recipe: ModelRecipe, index_folder: Path, seed: int) -> BlockSource:
    """The multi-crop blocks of a self-supervised stage, from a curated index."""
    index = PhotoIndex.load(index_folder)
    order = SampleOrder(
        {name: index.rows_of(name) for name in sorted(set(index.components))},
        homogeneous=config.homogeneous,
        homogeneous_ratio=config.homogeneous_ratio,
        batch_size=config.batch_size,
        seed=seed,
    )
    return CropBlocks(
        index,
        order,
        lambda step: config.crops_at(step, seed),
        patch_size=preset(recipe.model).patch_size,
        block_size=config.block_size,
        seed=seed,
        mask_ratio=config.mask_ratio,
        mask_probability=config.mask_probability,
    )


def save_backbone(export: Path, recipe: ModelRecipe, folder: Path, image_size: int) -> None:
    """The backbone of an export as a folder that `orchestrator.models.load_pretrained` reads."""
    weights = load_export(export, "backbone.")
    save_pretrained(folder, weights, recipe.model, {"image_size": image_size})
