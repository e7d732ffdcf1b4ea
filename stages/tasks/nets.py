"""A backbone with its two heads, and the DINO and iBOT terms that pretraining and distillation share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.data.rng import derive
from orchestrator.models import Features, PrototypeHead, ViTConfig, build, layer_depths, normalise, preset
from orchestrator.models.blocks import Block
from orchestrator.objectives.dino import dino_loss
from orchestrator.objectives.ibot import ibot_loss
from orchestrator.spec import Optimizer
from orchestrator.stages.selfsup import Heads


class HeadedBackbone(nn.Module):
    """Backbone, DINO head and iBOT head as one module, so that one call is one forward for ZeRO-3."""

    def __init__(self, model: str, drop_path: float, heads: Heads) -> None:
        super().__init__()
        self.backbone = build(model, drop_path=drop_path)
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
    ) -> dict[str, Tensor]:
        """Features and head outputs of global (and local) crops.

        Args:
            globals_NCHW: uint8 global crops, views before images.
            locals_LCHW: uint8 local crops, or None.
            tokens_M: flat indices, over (N, grid), of the patch tokens that go through the iBOT head.
            grid: the grid that `tokens_M` counts in; features on another grid are resized to it.
            masks_NP: patches replaced by the mask token.
            generator: of drop-path and RoPE rescales.
            with_logits: else the heads give their bottleneck only.

        Returns:
            cls (N, D), patches (N, P, D), dino (N+L, C or K), ibot (M, C or K).
        """
        if locals_LCHW is None:
            features = self.backbone(normalise(globals_NCHW), masks_NP, generator)
            cls = features.cls
        else:
            features, local_features = self.backbone(
                normalise(globals_NCHW), masks_NP, generator, locals_BCHW=normalise(locals_LCHW)
            )
            cls = torch.cat([features.cls, local_features.cls])
        patches_NPD = on_grid(features, globals_NCHW.shape[-2:], self.patch_size, grid)
        tokens_MD = patches_NPD.flatten(0, 1)[tokens_M]
        dino = self.dino_head(cls, with_logits)[1 if with_logits else 0]
        ibot = self.ibot_head(tokens_MD, with_logits)[1 if with_logits else 0]
        return {"cls": features.cls, "patches": patches_NPD, "dino": dino, "ibot": ibot}


def whole_modules(*models: str) -> tuple[type[nn.Module], ...]:
    """What ZeRO-3 fetches as one unit: transformer blocks, which are called once a forward.

    A ConvNeXt block is called once for global and once for local crops, and ZeRO-3 would reduce the gradients
    of such a unit twice.
    """
    return (Block,) if all(isinstance(preset(model), ViTConfig) for model in models) else ()


def on_grid(features: Features, size: Sequence[int], patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Patch features (B, P, D), resized bicubically (and antialiased) to `grid` where theirs differs."""
    own = (size[0] // patch_size, size[1] // patch_size)
    if own == grid:
        return features.patches
    maps_BDHW = features.patches.transpose(1, 2).unflatten(2, own)
    resized = F.interpolate(maps_BDHW.float(), grid, mode="bicubic", align_corners=False, antialias=True)
    return resized.flatten(2).transpose(1, 2).to(features.patches.dtype)


def resize_masks(masks_NP: Tensor, grid: tuple[int, int], own: tuple[int, int]) -> Tensor:
    """Masks (N, P) of one grid on another: a cell is masked where at least half of its area is."""
    if grid == own:
        return masks_NP
    maps = masks_NP.unflatten(1, grid)[:, None].float()
    return F.interpolate(maps, own, mode="area")[:, 0].flatten(1) >= 0.5


def flat_views(views_VBX: Tensor) -> Tensor:
    """(V, B, …) → (V·B, …)."""
    return views_VBX.flatten(0, 1)


def masked_tokens(masks_NP: Tensor) -> Tensor:
    """Flat indices (M,) of the masked patches over (N, P)."""
    return masks_NP.flatten().nonzero()[:, 0]


def block_generator(seed: int, step: int, block: int) -> torch.Generator:
    """The randomness of one block's forward, the same on whichever worker computes it."""
    return torch.Generator().manual_seed(derive(seed, "forward", step, block) % 2**63)


def distillation_losses(
    out: Mapping[str, Tensor],
    dino_targets_GBK: Tensor,
    ibot_targets_MK: Tensor,
    tokens_M: Tensor,
    *,
    num_patches: int,
    local_weight: float,
    ibot_weight: float,
    temperature: float,
) -> dict[str, Tensor]:
    """The weighted DINO (global and local) and iBOT terms of one block.

    The DINO terms are weighted by their share of all view pairs, as in DINOv2 and DINOv3: with 2 globals and 8
    locals 16/18 for local against global and 2/18 for global against the other global.
    """
    num_globals, batch = dino_targets_GBK.shape[:2]
    logits_VBK = out["dino"].unflatten(0, (-1, batch))
    num_locals = len(logits_VBK) - num_globals
    local_pairs, global_pairs = num_locals * num_globals, num_globals * (num_globals - 1)
    pairs = local_pairs + global_pairs
    losses = {}
    if local_pairs:
        loss = dino_loss(logits_VBK[num_globals:], dino_targets_GBK, skip_same=False, temperature=temperature)
        losses["dino_local"] = local_weight * local_pairs / pairs * loss
    if global_pairs:
        loss = dino_loss(logits_VBK[:num_globals], dino_targets_GBK, temperature=temperature)
        losses["dino_global"] = global_pairs / pairs * loss
    crops_M = tokens_M // num_patches
    losses["ibot"] = ibot_weight * ibot_loss(
        out["ibot"], ibot_targets_MK, crops_M, num_globals * batch, temperature=temperature
    )
    return losses


def learning_rate_scales(net: HeadedBackbone, optimizer: Optimizer) -> dict[str, float]:
    """Layer-wise decay for the backbone, the patch embedding's own factor; heads learn at the full rate."""
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
