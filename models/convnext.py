"""ConvNeXt (arXiv 2201.03545) as distilled in DINOv3: pooled map as CLS, last map as patches."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import add_residual, draw_rows, linear
from .configs import ConvNeXtConfig
from .vit import Features, check_masks, patch_grid


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """x + γ · mlp(norm(depthwise 7×7 (x)))."""

    def __init__(self, dim: int, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.up = linear(dim, 4 * dim)
        self.down = linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), config.layer_scale_init))

    def forward(self, x_BCHW: Tensor, rows: Tensor | None = None) -> Tensor:
        return add_residual(x_BCHW, self._branch, rows)

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
        stem = nn.Sequential(nn.Conv2d(3, dims[0], stride, stride), MapNorm(dims[0], eps=config.norm_eps))
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
    ) -> Features | tuple[Features, Features]:
        """Features of normalised images of any size that the total stride divides.

        Args:
            images_BCHW: float (B, 3, H, W), normalised with ImageNet mean and std.
            masks_BP: bool (B, P) on the final grid; masked cells get the mask token after the stem. Unlike a
                transformer's, the neighbours of a masked cell still look into it through the convolutions.
            generator: source of drop-path rows in training; without one nothing is random.
            is_local: accepted for the common signature; one norm serves all crops.
            locals_BCHW: local crops; the result is then the pair of both groups' features.

        Raises:
            ValueError: the stride does not divide H or W, or the mask has another shape than the grid.
        """
        features = self._group(images_BCHW, masks_BP, generator)
        return features if locals_BCHW is None else (features, self._group(locals_BCHW, None, generator))

    def _group(
        self, images_BCHW: Tensor, masks_BP: Tensor | None, generator: torch.Generator | None
    ) -> Features:
        batch = images_BCHW.shape[0]
        grid = patch_grid(images_BCHW, self.patch_size)
        random = generator if self.training else None
        num_blocks, done = sum(self.config.depths), 0
        x_BCHW = images_BCHW.to(self.mask_token.dtype)
        for index, (downsample, stage) in enumerate(zip(self.downsamples, self.stages, strict=True)):
            x_BCHW = downsample(x_BCHW)
            if index == 0:
                x_BCHW = self._masked(x_BCHW, masks_BP, grid)
            for block in stage:  # type: ignore[attr-defined]
                rate = self.config.drop_path * done / max(1, num_blocks - 1)
                x_BCHW = block(x_BCHW, draw_rows(batch, rate, random, x_BCHW.device))
                done += 1
        x_BPD = x_BCHW.flatten(2).transpose(1, 2)
        normed_BND = self.norm(torch.cat([x_BPD.mean(dim=1, keepdim=True), x_BPD], dim=1))
        return Features(normed_BND[:, 0], normed_BND[:, 1:1], normed_BND[:, 1:])

    def _masked(self, x_BCHW: Tensor, masks_BP: Tensor | None, grid: tuple[int, int]) -> Tensor:
        token = self.mask_token.to(x_BCHW.dtype)  # autocast may have changed the map's dtype
        if masks_BP is None:
            # Factor 0: the mask token has a gradient on every worker, masked batch or not.
            return x_BCHW + 0 * token
        check_masks(masks_BP, x_BCHW.shape[0], grid[0] * grid[1])
        mask_B1HW = masks_BP.view(-1, 1, *grid).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        return torch.where(mask_B1HW, token, x_BCHW)
