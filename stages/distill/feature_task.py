"""The side of a student in `distill` from headless teachers: its projections, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.pixels import PixelFormat
from orchestrator.models.wrapped_backbone import WrappedBackbone
from orchestrator.objectives.features import Grid, common_grid, feature_loss, resize_tokens
from orchestrator.stages.common.backbone import see_pixels
from orchestrator.stages.common.nets import (
    block_generator,
    build_backbone,
    flat_views,
    forward_views,
    frozen_backbone,
    learning_rate_scales,
    tune,
    zero3_leaf_modules,
)
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.features import FeatureObjective, TeacherShape
from orchestrator.stages.distill.student_backbone import backbone_of
from orchestrator.stages.distill.student_config import Student
from orchestrator.training.export import load_export
from orchestrator.training.task import BlockTensors, Losses, Modules, Reduce, Weights


class ProjectedBackbone(nn.Module):
    """Backbone and, for each teacher, projections of CLS and of patches: one module, so that one call is one forward.

    A projection is linear, so that the backbone's own features have to say what the teacher's say; with
    `objective.hidden` it is Linear, GELU, Linear.
    """

    def __init__(
        self,
        model: str | WrappedBackbone,
        drop_path: float,
        objective: FeatureObjective,
        shapes: Mapping[str, TeacherShape],
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(model, drop_path, overrides)

        def heads(names: Sequence[str]) -> nn.ModuleDict:
            # A dict of modules has no place for names such as `keys`, so the teacher's is set off.
            widths = {f"of_{name}": shapes[name].dim for name in names}
            return nn.ModuleDict(
                {name: _projection(self.backbone.dim, objective.hidden, dim) for name, dim in widths.items()}
            )

        # A parameter that no loss reaches would have no gradient on any worker.
        terms = {name: objective.terms_of(name) for name in shapes}
        self.cls_heads = heads([name for name, weights in terms.items() if weights.uses_cls])
        self.patch_heads = heads([name for name, weights in terms.items() if weights.patches])

    @property
    def patch_size(self) -> int:
        """Pixels a side of what one patch token stands for."""
        return int(self.backbone.patch_size)

    def forward(
        self,
        globals_NCHW: Tensor,
        locals_LCHW: Tensor | None,
        grids: Mapping[str, Grid],
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """What it takes the teachers to say.

        Args:
            globals_NCHW: uint8 global crops, views before images.
            locals_LCHW: uint8 local crops, or None.
            grids: for each teacher, the grid on which patches are compared.
            generator: of drop-path and RoPE rescales.

        Returns:
            NAME.cls (N+L, D) and NAME.patches (N, P, D) of what has a weight, D being the teacher's width and P the
            cells of its grid.
        """
        features, cls_ND = forward_views(self.backbone, globals_NCHW, locals_LCHW, None, generator)
        height, width = globals_NCHW.shape[-2:]
        own = (height // self.patch_size, width // self.patch_size)
        out = {f"{name.removeprefix('of_')}.cls": head(cls_ND) for name, head in self.cls_heads.items()}
        for key, head in self.patch_heads.items():
            name = key.removeprefix("of_")
            # Resized before the projection: fewer rows go through it.
            out[f"{name}.patches"] = head(resize_tokens(features.patches, own, grids[name]))
        return out


class FeatureTask:
    """A student with its EMA. Its teachers' features come with the blocks.

    The loss is the sum over teachers of weight · (cls_weight · CLS term + patch_weight · patch term + local_weight ·
    local term), each a :func:`feature_loss`. Students see whole crops: there are no masks.

    Args:
        config: the stage's.
        student: which of its students.
        objective: the stage's feature objective.
        shapes: of the teachers, from `feature_teacher.prepare`.
        seed: the student's.
        start: a file of :func:`orchestrator.stages.common.weights.starting_weights`; None starts at random.
        pixels: how the photographs are seen; None for 8-bit RGB.
    """

    modules: Modules

    def __init__(
        self,
        config: Distill,
        student: Student,
        objective: FeatureObjective,
        shapes: Mapping[str, TeacherShape],
        seed: int,
        start: Path | None = None,
        pixels: PixelFormat | None = None,
    ) -> None:
        self.pixels = pixels
        self.config, self.student, self.objective = config, student, objective
        self.shapes, self.seed, self.start = shapes, seed, start

    def build(self, device: str) -> Modules:
        """See `Task`."""
        student = self.student
        more = self.objective, self.shapes, student.model_overrides
        net, ema = (
            ProjectedBackbone(backbone_of(self.config, student, self.seed), drop_path, *more)
            for drop_path in (student.drop_path, 0.0)
        )
        if self.start is not None:
            net.backbone.load_state_dict(load_export(self.start, "backbone."))
        net, ema = net.to(device), ema.to(device)
        ema.load_state_dict(net.state_dict())
        for each in (net, ema):
            tune(each, self.config)
            see_pixels(each.backbone, self.pixels)
        self.patch_size = net.patch_size
        self.modules = Modules(
            net,
            ema=ema,
            lr_scales=learning_rate_scales(net, student.optimizer or self.config.optimizer),
            frozen_steps=frozen_backbone(net, student.freeze_backbone_steps),
            zero3_leaf_modules=zero3_leaf_modules(student.model),
        )
        return self.modules

    def prepare_step(self, step: int) -> None:
        """Nothing here depends on the step."""

    @torch.no_grad()
    def targets(self, blocks: Sequence[BlockTensors], reduce: Reduce) -> list[dict[str, Tensor]]:
        """What the teachers say of each block: NAME.cls (G, B, D) and NAME.patches (G·B, P, D) on the common grid.

        Only what has a weight.
        """
        result = []
        for block in blocks:
            found = {}
            for name, grid in self._grids(block).items():
                weights = self.objective.terms_of(name)
                if weights.uses_cls:
                    found[f"{name}.cls"] = block.tensors[f"{name}.cls"]
                if weights.patches:
                    patches_NPD = flat_views(block.tensors[f"{name}.patches"])
                    found[f"{name}.patches"] = resize_tokens(patches_NPD, self.shapes[name].grid, grid)
            result.append(found)
        return result

    def losses(self, block: BlockTensors, target: Mapping[str, Tensor]) -> Losses:
        """The terms of one block, by teacher."""
        objective, tensors = self.objective, block.tensors
        has_locals = objective.local_weight > 0 and "locals" in tensors and len(tensors["locals"]) > 0
        globals_NCHW = flat_views(tensors["globals"])
        out = self.modules.trainable(
            globals_NCHW,
            flat_views(tensors["locals"]) if has_locals else None,
            self._grids(block),
            block_generator(self.seed, block.step, block.index),
        )
        terms = {}
        for name, weight in objective.weights.items():
            for kind, term in self._terms(name, out, target, len(globals_NCHW)).items():
                terms[f"{name}_{kind}"] = weight * term
        return Losses(
            torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}
        )

    def after_step(self, step: int, weights: Weights, metrics: Mapping[str, float]) -> None:
        """The student's own EMA, which is what gets exported."""
        weights.update_ema(self.config.ema_of(self.student).at(step, self.config.steps_of(self.student)))

    def _terms(
        self, name: str, out: Mapping[str, Tensor], target: Mapping[str, Tensor], num_globals: int
    ) -> dict[str, Tensor]:
        """One teacher's weighted terms."""
        weights = self.objective.terms_of(name)
        terms = {}
        if weights.cls:
            said_ND, wanted_GBD = out[f"{name}.cls"][:num_globals], target[f"{name}.cls"]
            terms["cls"] = weights.cls * self._distance(said_ND, flat_views(wanted_GBD))
        if weights.patches:
            said_NPD, wanted_NPD = out[f"{name}.patches"], target[f"{name}.patches"]
            terms["patches"] = weights.patches * self._distance(said_NPD, wanted_NPD)
        if weights.local and len(out[f"{name}.cls"]) > num_globals:
            wanted_GBD = target[f"{name}.cls"]
            said_LBD = out[f"{name}.cls"][num_globals:].unflatten(0, (-1, wanted_GBD.shape[1]))
            wanted_LBD = wanted_GBD.float().mean(dim=0).expand_as(said_LBD)
            terms["local"] = weights.local * self._distance(said_LBD, wanted_LBD)
        return terms

    def _distance(self, said_XD: Tensor, wanted_XD: Tensor) -> Tensor:
        return feature_loss(said_XD, wanted_XD, self.objective.cosine_weight)

    def _grids(self, block: BlockTensors) -> dict[str, Grid]:
        """Where each teacher's patches are compared with the student's."""
        height, width = block.tensors["globals"].shape[-2:]
        own = (height // self.patch_size, width // self.patch_size)
        return {name: common_grid(own, shape.grid) for name, shape in self.shapes.items()}


def _projection(dim: int, hidden: int | None, wanted: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(dim, wanted)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, wanted))
