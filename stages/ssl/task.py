"""The task of `pretrain`, `gram_anchor` and `high_res`: student, EMA teacher and, when anchored, a Gram teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.models import build, normalise
from orchestrator.objectives.dense_health import cls_patch_cosine, patch_locality
from orchestrator.objectives.gram import gram_loss
from orchestrator.stages.common.backbone import see_pixels
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.common.lineage import Health
from orchestrator.stages.common.loss_terms import Distillation, TargetProbs, centred, with_prototypes
from orchestrator.stages.common.nets import (
    HeadedBackbone,
    block_generator,
    flat_views,
    frozen_backbone,
    frozen_prototypes,
    learning_rate_scales,
    masked_tokens,
    num_views,
    on_grid,
    spread_views,
    tune,
    zero3_leaf_modules,
)
from orchestrator.stages.objective import StudentOutput
from orchestrator.stages.ssl.anchor import AnchorDecision, DenseHealthMonitor
from orchestrator.stages.ssl.config import SelfSupervised
from orchestrator.stages.ssl.probe_photos import accuracy
from orchestrator.stages.ssl.stop_if import HealthLimit
from orchestrator.training.export import load_export
from orchestrator.training.task import BlockTensors, Losses, Modules, Reduce, Weights

logger = logging.getLogger("orchestrator")


@dataclass(frozen=True)
class SelfSupervisedTargets:
    """One block's no-grad side: DINO targets (G, B, K), iBOT targets (1, M, K), Gram features, health metrics."""

    dino: TargetProbs
    ibot: TargetProbs
    tokens_M: Tensor
    gram_NPD: Tensor | None
    metrics: dict[str, Tensor]


class SelfSupervisedTask:
    """DINO + iBOT + KoLeo, with Gram anchoring where the config has it."""

    modules: Modules

    def __init__(
        self,
        config: SelfSupervised,
        recipe: ModelRecipe,
        seed: int,
        gram_weights: Path | None,
        gram_health: Health | None = None,
        start: Path | None = None,
        gram_sha256: str | None = None,
    ) -> None:
        """`gram_weights` is the snapshot to anchor to at first; `gram_health` how healthy it was, if that is known.

        `gram_sha256` is what its content has to have: the driver does not compare it.
        `start` is a file of :func:`orchestrator.stages.common.weights.starting_weights`; None starts at random.
        """
        self.config, self.recipe, self.seed, self.gram_weights = config, recipe, seed, gram_weights
        self.gram_health, self.start, self.gram_sha256 = gram_health, start, gram_sha256
        self.local_weight = 0.0
        self.gram_weight: float | None = None
        self.teacher_temperature = config.teacher_temperature.peak

    def build(self, device: str) -> Modules:
        """See `Task`: student and EMA teacher start equal; the Gram teacher from its snapshot."""
        config, recipe = self.config, self.recipe
        overrides = recipe.model_overrides
        student = HeadedBackbone(recipe.model, recipe.drop_path, recipe.heads, overrides)
        if self.start is not None:
            student.backbone.load_state_dict(load_export(self.start, "backbone."))
        student = student.to(device)
        teacher = HeadedBackbone(recipe.model, 0.0, recipe.heads, overrides).to(device)
        teacher.load_state_dict(student.state_dict())
        copies: dict[str, nn.Module] = {}
        if self.gram_weights is not None:
            gram = build(recipe.model, **overrides).to(device)
            gram.load_state_dict(load_export(self.gram_weights, "backbone.", self.gram_sha256))
            copies["gram"] = gram
        for net in (student, teacher, *copies.values()):
            tune(net, config)
        for tower in (student.backbone, teacher.backbone, *copies.values()):
            see_pixels(tower, recipe.pixels)
        self.patch_size = student.patch_size
        self.prototypes: dict[str, Tensor] = {}
        self.modules = Modules(
            student,
            ema=teacher,
            copies=copies,
            lr_scales=learning_rate_scales(student, config.optimizer),
            frozen_steps=frozen_prototypes(config.frozen_prototype_steps)
            | frozen_backbone(student, config.freeze_backbone_steps),
            zero3_leaf_modules=zero3_leaf_modules(recipe.model),
        )
        trigger = config.gram.trigger if config.gram else None
        self.monitor = DenseHealthMonitor(trigger, self.modules.state, self.gram_health)
        self.limit = HealthLimit(config.stop_if, self.modules.state)
        return self.modules

    def prepare_step(self, step: int) -> None:
        """Loss weights and temperature of this step; what belongs to anchoring counts from when that started."""
        config, started = self.config, self.monitor.started
        self.teacher_temperature = config.teacher_temperature.at(step, config.steps)
        if started is None:
            self.local_weight, self.gram_weight = config.local_weight.at(0, config.steps), None
            return
        since, rest = step - started, config.steps - started
        self.local_weight = config.local_weight.at(since, rest)
        self.gram_weight = config.gram.weight.at(since, rest) if config.gram else None

    @torch.no_grad()
    def targets(self, blocks: Sequence[BlockTensors], reduce: Reduce) -> list[SelfSupervisedTargets]:
        """Teacher forward a block at a time, then Sinkhorn-Knopp over the global batch of the step."""
        outs = [self._teacher(block, first=number == 0) for number, block in enumerate(blocks)]
        num_globals = len(blocks[0].tensors["globals"])
        dino = self._centred(
            [out["dino"].unflatten(0, (num_globals, -1)) for out in outs], blocks, reduce, "dino"
        )
        ibot = self._centred([out["ibot"][None] for out in outs], blocks, reduce, "ibot")
        return [
            SelfSupervisedTargets(
                of_dino, of_ibot, self._tokens(block), self._gram_features(block), self._health(block, out)
            )
            for block, out, of_dino, of_ibot in zip(blocks, outs, dino, ibot, strict=True)
        ]

    def losses(self, block: BlockTensors, target: SelfSupervisedTargets) -> Losses:
        """All terms of one block."""
        config = self.config
        masks_NP = flat_views(block.tensors["masks"])
        distillation = Distillation(
            target.dino,
            target.ibot,
            target.tokens_M,
            num_patches=masks_NP.shape[1],
            num_views=num_views(block.tensors),
            local_weight=self.local_weight,
            ibot_weight=config.ibot_weight,
            temperature=config.student_temperature,
            chunk_rows=config.chunk_rows,
        )
        out = self.modules.trainable(
            flat_views(block.tensors["globals"]),
            flat_views(block.tensors["locals"]) if "locals" in block.tensors else None,
            target.tokens_M,
            self._grid(block),
            masks_NP,
            block_generator(self.seed, block.step, block.index),
            scores=distillation.scores(),
        )
        terms = distillation.terms(out)
        views_GBD = out["cls"].unflatten(0, (len(block.tensors["globals"]), -1))
        spread = spread_views(views_GBD, config.koleo_views, config.koleo_group)
        more = {"koleo": config.koleo_weight * spread}
        if target.gram_NPD is not None:
            more["gram"] = self._gram(out["patches"], target.gram_NPD)
        if config.objectives:
            more |= self._own(out, block)
        total = torch.stack([*terms.parts, *more.values()]).sum()
        return Losses(total, {**terms.metrics, **more, **target.metrics})

    def after_step(self, step: int, weights: Weights, metrics: Mapping[str, float]) -> None:
        """EMA; then the Gram teacher takes it when its turn has come.

        Raises:
            UserError: dense features have become worse than `stop_if` allows.
        """
        weights.update_ema(self.config.ema.at(step, self.config.steps))
        gram, done = self.config.gram, step + 1
        self.limit.update(done, metrics)
        if gram is None:
            return
        decision = self.monitor.update(done, metrics)
        if decision is AnchorDecision.START:
            logger.info("dense features have decayed: Gram anchoring starts after step %d", done)
        started = self.monitor.started
        if decision is AnchorDecision.KEEP or (started is not None and gram.updates_at(done - started)):
            weights.copy_ema("gram", "backbone.")

    @torch.no_grad()
    def probe(self, done: int, blocks: Sequence[BlockTensors], reduce: Reduce) -> dict[str, float]:
        """k-NN of the EMA backbone, on blocks of :class:`~orchestrator.stages.ssl.probe_photos.ProbePhotos`.

        Whoever has the first block counts, for all: the vote is the same one then, whatever machines there are.

        Raises:
            UserError: it has become worse than `stop_if` allows.
        """
        assert self.modules.ema is not None
        assert self.config.knn is not None
        rows_NVD: Tensor | None = None
        labels_N = blocks[0].tensors["labels"].new_zeros(int(blocks[0].tensors["count"]))
        for block in blocks:
            views_SV = block.tensors["photos"]
            height, width = views_SV.shape[-2:]
            out = self.modules.ema(
                views_SV.flatten(0, 1),
                None,
                block.tensors["labels"].new_zeros(0),
                (height // self.patch_size, width // self.patch_size),
                with_logits=False,
            )
            found_SVD = out["cls"].float().unflatten(0, views_SV.shape[:2])
            if rows_NVD is None:
                rows_NVD = found_SVD.new_zeros(len(labels_N), *found_SVD.shape[1:])
            if block.weight > 0:
                rows_NVD[block.tensors["places"]] = found_SVD
                labels_N[block.tensors["places"]] = block.tensors["labels"]
        assert rows_NVD is not None
        # A photo is on one worker, and zeros are added to it: that rounds nothing.
        rows_NVD, labels_N = reduce(rows_NVD), reduce(labels_N)
        counted = accuracy(rows_NVD.cpu().numpy(), labels_N.cpu().numpy(), self.config.knn.k)
        counts = any(block.index == 0 and block.weight > 0 for block in blocks)
        ((name, value),) = counted.items()
        told = torch.tensor([value if counts else 0.0], dtype=torch.float64, device=rows_NVD.device)
        figure = float(reduce(told))
        self.limit.update_knn(done, name, figure, self.config.knn)
        return {name: figure}

    def _teacher(self, block: BlockTensors, *, first: bool) -> dict[str, Tensor]:
        """The EMA's features, and its logits; for chunks its codes, and with the step's first block its prototypes."""
        assert self.modules.ema is not None
        chunked = self.config.chunk_rows is not None
        out: dict[str, Any] = self.modules.ema(
            flat_views(block.tensors["globals"]),
            None,
            self._tokens(block),
            self._grid(block),
            with_logits=not chunked,
            scores=dict.fromkeys(("dino", "ibot"), with_prototypes) if chunked and first else None,
        )
        if chunked and first:
            self.prototypes = {name: out[name][1] for name in ("dino", "ibot")}
            out |= {name: out[name][0] for name in ("dino", "ibot")}
        return out

    def _centred(
        self, rows: list[Tensor], blocks: Sequence[BlockTensors], reduce: Reduce, head: str
    ) -> list[TargetProbs]:
        return centred(
            rows,
            [block.weight for block in blocks],
            self.teacher_temperature,
            reduce,
            self.prototypes.get(head),
            self.config.chunk_rows,
        )

    def _gram(self, student_NPD: Tensor, teacher_NPD: Tensor) -> Tensor:
        gram = self.config.gram
        assert gram is not None
        assert self.gram_weight is not None
        loss = gram_loss(student_NPD, teacher_NPD, form=gram.form, clip_negatives=gram.clip_negatives)
        return self.gram_weight * loss

    def _own(self, out: Mapping[str, Any], block: BlockTensors) -> dict[str, Tensor]:
        """The weighted terms of users' objectives, by name."""
        views = (len(block.tensors["globals"]), -1)
        output = StudentOutput(
            cls_GBD=out["cls"].unflatten(0, views),
            patches_GBPD=out["patches"].unflatten(0, views),
            masks_GBP=block.tensors["masks"],
            step=block.step,
        )
        terms = {}
        for objective in self.config.objectives:
            term = objective.loss(output)
            if not isinstance(term, Tensor) or term.ndim:
                raise TypeError(
                    f"{objective.use}.loss did not return a scalar tensor: return the mean over the images"
                )
            terms[objective.title] = objective.weight * term.float()
        return terms

    def _gram_features(self, block: BlockTensors) -> Tensor | None:
        if self.gram_weight is None:
            return None
        assert self.config.gram is not None
        gram = self.modules.copies["gram"]
        views_NCHW = flat_views(block.tensors.get("gram", block.tensors["globals"]))
        return on_grid(
            gram(normalise(views_NCHW, gram)),
            views_NCHW.shape[-2:],
            self.patch_size,
            self._grid(block),
            self.config.gram.antialias,
        )

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
