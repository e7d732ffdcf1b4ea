"""ConvNeXt (arXiv 2201.03545) as distilled in DINOv3: pooled map as CLS, last map as patches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import add_residual, draw_rows, linear
from .configs import ConvNeXtConfig
from .vit import BackboneFeatures, Layers, check_masks, layer_indices, patch_grid


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """x + γ · mlp(norm(depthwise 7×7 (x))). `recompute`: as of :class:`TransformerBlock`."""

    recompute = False

    def __init__(self, dim: int, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.up = linear(dim, 4 * dim)
        self.down = linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), config.layer_scale_init))

    def forward(self, x_BCHW: Tensor, rows: Tensor | None = None) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return add_residual(x_BCHW, self._branch, rows)
        out_BCHW: Tensor = checkpoint(
            add_residual, x_BCHW, self._branch, rows, use_reentrant=False, preserve_rng_state=False
        )
        return out_BCHW

    def _branch(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.depthwise(x_BCHW).permute(0, 2, 3, 1)
        out_BHWC: Tensor = self.down(F.gelu(self.up(self.norm(x_BHWC)))) * self.gamma
        return out_BHWC.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """The same calls and results as :class:`VisionTransformer`, without storage tokens."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dims[-1]
        self.patch_size = config.patch_size
        dims, stride = config.dims, config.stem_stride
        stem = nn.Sequential(
            nn.Conv2d(config.num_channels, dims[0], stride, stride), MapNorm(dims[0], eps=config.norm_eps)
        )
        downsamples = [
            nn.Sequential(MapNorm(before, eps=config.norm_eps), nn.Conv2d(before, after, 2, 2))
            for before, after in pairwise(dims)
        ]
        self.mask_token = nn.Parameter(torch.zeros(1, dims[0], 1, 1))
        self.downsamples = nn.ModuleList([stem, *downsamples])
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvNeXtBlock(dim, config) for _ in range(depth))
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        self.norm = nn.LayerNorm(self.dim, eps=config.norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, first stage first."""
        return [module for module in self.modules() if isinstance(module, ConvNeXtBlock)]

    def forward(
        self,
        images_BCHW: Tensor,
        masks_BP: Tensor | None = None,
        generator: torch.Generator | None = None,
        is_local: bool = False,
        locals_BCHW: Tensor | None = None,
        layers: Sequence[int] | None = None,
        norm: bool = True,
    ) -> BackboneFeatures | tuple[BackboneFeatures, BackboneFeatures] | list[BackboneFeatures]:
        """Features of normalised images of any size that the total stride divides.

        Args:
            images_BCHW: float (B, C, H, W), normalised with the mean and std of `set_stats`.
            masks_BP: bool (B, P) on the final grid; masked cells get the mask token after the stem. Unlike a
                transformer's, the neighbours of a masked cell still look into it through the convolutions.
            generator: source of drop-path rows in training; without one nothing is random.
            is_local: accepted for the common signature; one norm serves all crops.
            locals_BCHW: local crops; the result is then the pair of both groups' features.
            layers: indices of stages, from 0: the result is then a list of their outputs (see `features`).
            norm: with `layers`, whether the final norm is applied to the last stage's.

        Raises:
            ValueError: the stride does not divide H or W, or the mask has another shape than the grid.
        """
        maps = self._stages(images_BCHW, masks_BP, generator)
        if layers is not None:
            last = len(maps) - 1
            return [self._tokens(maps[index], norm and index == last) for index in layers]
        features = self._tokens(maps[-1], True)
        if locals_BCHW is None:
            return features
        return features, self._tokens(self._stages(locals_BCHW, None, generator)[-1], True)

    def features(
        self, images_BCHW: Tensor, layers: Layers = None, norm: bool = True
    ) -> list[BackboneFeatures]:
        """Features after one or more of the four stages: the pooled map as CLS and the map's cells as patches.

        Args:
            images_BCHW: float (B, C, H, W), normalised with the mean and std of `set_stats`.
            layers: a number n for the last n stages, or indices of stages (negative ones count from the last);
                None: the last stage.
            norm: apply the final norm, which is the last stage's: earlier ones have other widths and no norm.

        Returns:
            One for each stage, in the order asked for; stage s has (H / c) · (W / c) patches of width dims[s],
            c = stem_stride · 2^s.

        Raises:
            ValueError: no such stage, or as the forward.
        """
        # Through __call__: under ZeRO-3 the mask token is gathered around it.
        wanted = layer_indices(layers, len(self.stages))
        features: list[BackboneFeatures] = self(images_BCHW, layers=wanted, norm=norm)
        return features

    def _stages(
        self, images_BCHW: Tensor, masks_BP: Tensor | None, generator: torch.Generator | None
    ) -> list[Tensor]:
        """The map (B, C, H, W) after each stage."""
        batch = images_BCHW.shape[0]
        grid = patch_grid(images_BCHW, self.patch_size)
        random = generator if self.training else None
        num_blocks, done = sum(self.config.depths), 0
        maps = []
        x_BCHW = images_BCHW.to(self.mask_token.dtype)
        for index, (downsample, stage) in enumerate(zip(self.downsamples, self.stages, strict=True)):
            x_BCHW = downsample(x_BCHW)
            if index == 0:
                x_BCHW = self._masked(x_BCHW, masks_BP, grid)
            for block in stage:  # type: ignore[attr-defined]
                rate = self.config.drop_path * done / max(1, num_blocks - 1)
                x_BCHW = block(x_BCHW, draw_rows(batch, rate, random, x_BCHW.device))
                done += 1
            maps.append(x_BCHW)
        return maps

    def _tokens(self, x_BCHW: Tensor, norm: bool) -> BackboneFeatures:
        x_BPD = x_BCHW.flatten(2).transpose(1, 2)
        x_BND = torch.cat([x_BPD.mean(dim=1, keepdim=True), x_BPD], dim=1)
        if norm:
            x_BND = self.norm(x_BND)
        return BackboneFeatures(x_BND[:, 0], x_BND[:, 1:1], x_BND[:, 1:])

    def _masked(self, x_BCHW: Tensor, masks_BP: Tensor | None, grid: tuple[int, int]) -> Tensor:
        token = self.mask_token.to(x_BCHW.dtype)  # autocast may have changed the map's dtype
        if masks_BP is None:
            # Factor 0: the mask token has a gradient on every worker, masked batch or not.
            return x_BCHW + 0 * token
        check_masks(masks_BP, x_BCHW.shape[0], grid[0] * grid[1])
        mask_B1HW = masks_BP.view(-1, 1, *grid).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        return torch.where(mask_B1HW, token, x_BCHW)
