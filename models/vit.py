"""The DINOv3 vision transformer (arXiv 2508.10104, section 3.2): axial RoPE, storage tokens, LayerScale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Rotation, TransformerBlock, draw_rows
from .configs import ViTConfig
from .rope import axial_angles, log_uniform_rescales, rotation

Layers = int | Sequence[int] | None


class BackboneFeatures(NamedTuple):
    """What a vision tower gives, after its final norm unless that was refused.

    Attributes:
        cls: (B, D).
        storage: (B, S, D), the register tokens; S is 0 where the tower has none.
        patches: (B, P, D), row-major over the grid.
    """

    cls: Tensor
    storage: Tensor
    patches: Tensor


class PatchEmbed(nn.Conv2d):
    """Linear embedding of non-overlapping patches; keeps the fan-in initialisation of convolutions."""

    def __init__(self, patch_size: int, dim: int, num_channels: int = 3) -> None:
        super().__init__(num_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) → (B, P, D)."""
        return super().forward(images_BCHW.to(self.weight.dtype)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """[CLS, storage tokens, patches] through `depth` pre-norm blocks and a final norm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.patch_size = config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.dim, config.num_channels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        # ZeRO-3 cannot hold a parameter without elements.
        self.storage_tokens: nn.Parameter | None = None
        if config.num_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.empty(1, config.num_storage_tokens, config.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.local_norm: nn.LayerNorm | None = None
        if config.separate_local_norm:
            self.local_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.storage_tokens is not None:
            nn.init.trunc_normal_(self.storage_tokens, std=0.02)

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
        """Features of normalised images of any size that the patch divides.

        Args:
            images_BCHW: float (B, C, H, W), normalised with the mean and std of `set_stats`.
            masks_BP: bool (B, P), True where a patch is replaced by the mask token.
            generator: source of drop-path rows and RoPE rescales in training; without one, nor in eval mode,
                nothing is random. Best on the CPU: the same draws on every device, and no device sync.
            is_local: the images are local crops (matters with `separate_local_norm` only).
            locals_BCHW: local crops, of another size and number, that go through the same call of each block;
                the result is then the pair of both groups' features.
            layers: indices of blocks, from 0: the result is then a list of their outputs (see `features`).
            norm: with `layers`, whether the final norm is applied to each.

        Raises:
            ValueError: the patch does not divide H or W, or the mask has another shape than the grid.
        """
        random = generator if self.training else None
        groups = [self._embed(images_BCHW, masks_BP)]
        if locals_BCHW is not None:
            groups.append(self._embed(locals_BCHW, None))
        draws = [self._draw(tokens, grid, random) for tokens, grid in groups]
        x = [tokens for tokens, _ in groups]
        taken: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            first, *more = [(tokens, *draw[index]) for tokens, draw in zip(x, draws, strict=True)]
            out = block(*first, *more)
            x = list(out) if more else [out]
            if layers is not None and index in layers:
                taken[index] = x[0]
        if layers is not None:
            outputs = {
                index: self._normed(out, is_local) if norm else self._split(out)
                for index, out in taken.items()
            }
            return [outputs[index] for index in layers]
        features = self._normed(x[0], is_local)
        return features if locals_BCHW is None else (features, self._normed(x[1], True))

    def features(
        self, images_BCHW: Tensor, layers: Layers = None, norm: bool = True
    ) -> list[BackboneFeatures]:
        """Features after one or more blocks.

        Args:
            images_BCHW: float (B, C, H, W), normalised with the mean and std of `set_stats`.
            layers: a number n for the last n blocks, or indices of blocks (negative ones count from the last);
                None: the last block.
            norm: apply the final norm to each; without it, the raw outputs.

        Returns:
            One for each layer, in the order asked for.

        Raises:
            ValueError: no such block, or as the forward.
        """
        # Through __call__: under ZeRO-3 the tokens are gathered around it.
        wanted = layer_indices(layers, len(self.blocks))
        features: list[BackboneFeatures] = self(images_BCHW, layers=wanted, norm=norm)
        return features

    def _embed(self, images_BCHW: Tensor, masks_BP: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, 1 + S + P, D) and the grid."""
        grid = patch_grid(images_BCHW, self.patch_size)
        patches_BPD = self.patch_embed(images_BCHW)
        if masks_BP is not None:
            check_masks(masks_BP, len(images_BCHW), grid[0] * grid[1])
            patches_BPD = torch.where(masks_BP[..., None], self.mask_token.to(patches_BPD.dtype), patches_BPD)
        # The mask token enters with factor 0 so that it has a gradient on every worker, masked batch or not.
        prefix_1SD = self.cls_token + 0 * self.mask_token
        if self.storage_tokens is not None:
            prefix_1SD = torch.cat([prefix_1SD, self.storage_tokens], dim=1)
        return torch.cat([prefix_1SD.expand(images_BCHW.shape[0], -1, -1), patches_BPD], dim=1), grid

    def _draw(
        self, x_BND: Tensor, grid: tuple[int, int], random: torch.Generator | None
    ) -> list[tuple[Rotation, Tensor | None, Tensor | None]]:
        """Each block's rotation and the rows that take its two branches."""
        config = self.config
        num_prefix = 1 + config.num_storage_tokens
        angles = axial_angles(*grid, config.dim // config.num_heads, config.rope_base, x_BND.device)
        rescales = [1.0] * config.depth
        if random is not None and config.rope_rescale is not None:
            rescales = log_uniform_rescales(config.depth, config.rope_rescale, random)
        rotations = {rescale: rotation(angles, num_prefix, rescale) for rescale in set(rescales)}
        batch = x_BND.shape[0]

        def rows() -> Tensor | None:
            return draw_rows(batch, config.drop_path, random, x_BND.device)

        return [(rotations[rescale], rows(), rows()) for rescale in rescales]

    def _normed(self, x_BND: Tensor, is_local: bool) -> BackboneFeatures:
        num_prefix = 1 + self.config.num_storage_tokens
        if self.local_norm is None or not self.training or not is_local:
            return self._split(self.norm(x_BND))
        prefix_BSD = self.local_norm(x_BND[:, :num_prefix])
        return BackboneFeatures(prefix_BSD[:, 0], prefix_BSD[:, 1:], self.norm(x_BND[:, num_prefix:]))

    def _split(self, x_BND: Tensor) -> BackboneFeatures:
        num_prefix = 1 + self.config.num_storage_tokens
        return BackboneFeatures(x_BND[:, 0], x_BND[:, 1:num_prefix], x_BND[:, num_prefix:])


def layer_indices(layers: Layers, num_layers: int) -> list[int]:
    """The layers asked for as indices from 0: the last n, the listed ones, or the last.

    Raises:
        ValueError: there is no such layer, or none is asked for.
    """
    if layers is None or isinstance(layers, int):
        count = 1 if layers is None else layers
        if not 1 <= count <= num_layers:
            raise ValueError(f"the last {count} layers of {num_layers}; ask for 1 to {num_layers}")
        return list(range(num_layers - count, num_layers))
    wrong = [index for index in layers if not -num_layers <= index < num_layers]
    if wrong or not layers:
        raise ValueError(f"layers {list(layers)}: there are 0 to {num_layers - 1}")
    return [index % num_layers for index in layers]


def patch_grid(images_BCHW: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patch grid.

    Raises:
        ValueError: the patch does not divide the image.
    """
    height, width = images_BCHW.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"image of {height} x {width} px is not a multiple of the patch, {patch_size} px")
    return height // patch_size, width // patch_size


def check_masks(masks_BP: Tensor, batch: int, num_patches: int) -> None:
    """Refuses a mask that would broadcast silently over another grid or batch."""
    if masks_BP.dtype != torch.bool or masks_BP.shape != (batch, num_patches):
        got = f"{masks_BP.dtype} {tuple(masks_BP.shape)}"
        raise ValueError(f"masks are {got}; expected torch.bool {(batch, num_patches)}")


def _block(config: ViTConfig) -> TransformerBlock:
    return TransformerBlock(
        config.dim,
        config.num_heads,
        config.ffn_hidden or 4 * config.dim,
        ffn=config.ffn,
        qkv_bias=config.qkv_bias,
        key_bias=config.key_bias,
        layer_scale_init=config.layer_scale_init,
        norm_eps=config.norm_eps,
    )
