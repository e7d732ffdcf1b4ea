"""A backbone with its two heads, and what pretraining and distillation do with it alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schedules import Optimizer
from orchestrator.data.rng import derive
from orchestrator.models import (
    Backbone,
    BackboneFeatures,
    PrototypeHead,
    ViTConfig,
    build,
    layer_depths,
    normalise,
    preset,
)
from orchestrator.models.blocks import TransformerBlock
from orchestrator.models.heads import Score
from orchestrator.models.speed import compile_blocks, recompute_blocks
from orchestrator.models.wrapped_backbone import WrappedBackbone
from orchestrator.objectives.koleo import koleo
from orchestrator.stages.base import TrainStage
from orchestrator.stages.common.config import Heads, KoLeoViews

_KOLEO_GROUP = 16


class HeadedBackbone(nn.Module):
    """Backbone, DINO head and iBOT head as one module, so that one call is one forward for ZeRO-3.

    Args:
        model, drop_path, overrides: see :func:`build_backbone`.
        heads: their sizes.
    """

    def __init__(
        self,
        model: str | WrappedBackbone,
        drop_path: float,
        heads: Heads,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(model, drop_path, overrides)
        dim = self.backbone.dim
        self.dino_head = PrototypeHead(dim, heads.hidden, heads.dino_bottleneck, heads.dino_prototypes)
        self.ibot_head = PrototypeHead(dim, heads.hidden, heads.ibot_bottleneck, heads.ibot_prototypes)
        for head in (self.dino_head, self.ibot_head):
            nn.init.normal_(head.prototypes.weight, std=heads.prototype_std)

    @property
    def patch_size(self) -> int:
        """Pixels a side of what one patch token stands for."""
        return int(self.backbone.patch_size)

    def forward(
        self,
        globals_NCHW: Tensor,
        locals_LCHW: Tensor | None,
        tokens_M: Tensor,
        grid: tuple[int, int],
        masks_NP: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_logits: bool = True,
        scores: Mapping[str, Score] | None = None,
    ) -> dict[str, Any]:
        """Features and head outputs of global (and local) crops.

        Args:
            globals_NCHW: uint8 global crops, views before images.
            locals_LCHW: uint8 local crops, or None.
            tokens_M: flat indices, over (N, grid), of the patch tokens that go through the iBOT head.
            grid: the grid that `tokens_M` counts in; features on another grid are resized to it.
            masks_NP: patches replaced by the mask token.
            generator: of drop-path and RoPE rescales.
            with_logits: else the heads give their bottleneck only.
            scores: by head, "dino" and "ibot": what is made in the place of its logits.

        Returns:
            cls (N, D), patches (N, P, D), dino (N+L, C or K) and ibot (M, C or K) or what their scores made.
        """
        features, cls = forward_views(self.backbone, globals_NCHW, locals_LCHW, masks_NP, generator)
        patches_NPD = on_grid(features, globals_NCHW.shape[-2:], self.patch_size, grid)
        tokens_MD = patches_NPD.flatten(0, 1)[tokens_M]
        out = {"cls": features.cls, "patches": patches_NPD}
        for name, head, rows in (("dino", self.dino_head, cls), ("ibot", self.ibot_head, tokens_MD)):
            code, made = head(rows, with_logits, score=(scores or {}).get(name))
            out[name] = code if made is None else made
        return out


def forward_views(
    backbone: Backbone | WrappedBackbone,
    globals_NCHW: Tensor,
    locals_LCHW: Tensor | None,
    masks_NP: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[BackboneFeatures, Tensor]:
    """One forward pass of global (and local) crops.

    Args:
        backbone: sees the crops normalised.
        globals_NCHW: uint8 global crops.
        locals_LCHW: uint8 local crops, or None.
        masks_NP: patches of the global crops that are replaced by the mask token.
        generator: of drop-path and RoPE rescales.

    Returns:
        The features of the global crops, and the CLS tokens of all crops, (N+L, D).
    """
    seen_NCHW = normalise(globals_NCHW, backbone)
    if locals_LCHW is None:
        features: BackboneFeatures = backbone(seen_NCHW, masks_NP, generator)
        return features, features.cls
    features, of_locals = backbone(
        seen_NCHW, masks_NP, generator, locals_BCHW=normalise(locals_LCHW, backbone)
    )
    return features, torch.cat([features.cls, of_locals.cls])


def build_backbone(
    model: str | WrappedBackbone, drop_path: float, overrides: Mapping[str, Any] | None = None
) -> Backbone | WrappedBackbone:
    """A backbone, freshly initialised.

    Args:
        model: its name; or a network from elsewhere, which is built already and is taken as it is.
        drop_path: share of rows that skip a branch in training.
        overrides: the preset's fields that are replaced.
    """
    if isinstance(model, WrappedBackbone):
        return model
    return build(model, **{**(overrides or {}), "drop_path": drop_path})


def zero3_leaf_modules(*models: str | None) -> tuple[type[nn.Module], ...]:
    """What ZeRO-3 fetches as one unit: transformer blocks, which are called once a forward; None: no model of ours.

    A ConvNeXt block is called once for global and once for local crops, and ZeRO-3 would reduce the gradients
    of such a unit twice.
    """
    return (
        (TransformerBlock,) if all(model and isinstance(preset(model), ViTConfig) for model in models) else ()
    )


def tune(net: nn.Module, stage: TrainStage) -> None:
    """Recompute or compile blocks as the stage wants; to be done before ZeRO wraps the module."""
    if stage.activation_checkpointing:
        recompute_blocks(net)
    if stage.compile:
        compile_blocks(net)


def on_grid(
    features: BackboneFeatures,
    size: Sequence[int],
    patch_size: int,
    grid: tuple[int, int],
    antialias: bool = True,
) -> Tensor:
    """Patch features (B, P, D), resized bicubically to `grid` where theirs differs.

    Args:
        features: of images of `size`.
        size: height and width of those images, in pixels.
        patch_size: of the features.
        grid: rows and columns that are wanted.
        antialias: smooth before a map is made smaller.
    """
    own = (size[0] // patch_size, size[1] // patch_size)
    if own == grid:
        return features.patches
    maps_BDHW = features.patches.transpose(1, 2).unflatten(2, own)
    resized = F.interpolate(maps_BDHW.float(), grid, mode="bicubic", align_corners=False, antialias=antialias)
    return resized.flatten(2).transpose(1, 2).to(features.patches.dtype)


def resize_masks(masks_NP: Tensor, grid: tuple[int, int], own: tuple[int, int]) -> Tensor:
    """Masks (N, P) of one grid on another: a cell is masked where at least half of its area is."""
    if grid == own:
        return masks_NP
    maps = masks_NP.unflatten(1, grid)[:, None].float()
    return F.interpolate(maps, own, mode="area")[:, 0].flatten(1) >= 0.5


def spread_views(views_GBD: Tensor, which: KoLeoViews, group: int | None) -> Tensor:
    """KoLeo of the CLS features of the first global crop, or the sum of both crops' (G, B, D)."""
    chosen = views_GBD[:1] if which == "first" else views_GBD
    group_size = group or _KOLEO_GROUP
    return torch.stack([koleo(view_BD, group_size=group_size) for view_BD in chosen]).sum()


def flat_views(views_VBX: Tensor) -> Tensor:
    """(V, B, …) → (V·B, …)."""
    return views_VBX.flatten(0, 1)


def num_views(tensors: Mapping[str, Tensor]) -> int:
    """Views of each image that a student sees: globals, and locals if there are any."""
    return len(tensors["globals"]) + (len(tensors["locals"]) if "locals" in tensors else 0)


def masked_tokens(masks_NP: Tensor) -> Tensor:
    """Flat indices (M,) of the masked patches over (N, P)."""
    return masks_NP.flatten().nonzero()[:, 0]


def block_generator(seed: int, step: int, block: int) -> torch.Generator:
    """The randomness of one block's forward, the same on whichever worker computes it."""
    return torch.Generator().manual_seed(derive(seed, "forward", step, block) % 2**63)


class HasBackbone(Protocol):
    """A backbone with heads of any kind beside it."""

    @property
    def backbone(self) -> Backbone | WrappedBackbone: ...


def learning_rate_scales(net: HasBackbone, optimizer: Optimizer) -> dict[str, float]:
    """Layer-wise decay for the backbone, the patch embedding's own factor; heads learn at the full rate.

    So do networks from elsewhere, whose layers are not known.
    """
    if isinstance(net.backbone, WrappedBackbone):
        return {}
    depths = layer_depths(net.backbone)
    top = max(depths.values())
    scales = {}
    for name, depth in depths.items():
        scale = optimizer.layer_decay ** (top - depth)
        if name.startswith(("patch_embed.", "downsamples.0.")):
            scale *= optimizer.patch_embed_scale
        scales[f"backbone.{name}"] = scale
    return scales


def frozen_prototypes(steps: int) -> dict[str, int]:
    """Both prototype layers stay where they are for the first steps."""
    return {"dino_head.prototypes.weight": steps, "ibot_head.prototypes.weight": steps}


def frozen_backbone(net: HasBackbone, steps: int) -> dict[str, int]:
    """The whole backbone stays where it is for the first steps, and with it its average, which starts as its equal.

    None of it where there are no such steps: groups of the optimizer are then those without freezing.
    """
    names = (name for name, _ in net.backbone.named_parameters()) if steps else ()
    return {f"backbone.{name}": steps for name in names}
