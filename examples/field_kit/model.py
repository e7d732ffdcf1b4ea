"""A model: a small ViT whose first layer sees overlapping patches. The shape alone imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import orchestrator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StemConfig(orchestrator.ViTConfig):
    """A ViT's shape, and how far each patch looks beyond its border."""

    version: ClassVar[int] = 1  # raise it when `build` makes another model of the same shape
    overlap: int = 2

    def build(self) -> orchestrator.VisionTransformer:
        """The tower, freshly initialised."""
        from torch import nn

        class Stem(nn.Conv2d):
            def forward(self, images_BCHW: Tensor) -> Tensor:
                return super().forward(images_BCHW.to(self.weight.dtype)).flatten(2).transpose(1, 2)

        model = orchestrator.VisionTransformer(self)
        side, patch = self.patch_size + 2 * self.overlap, self.patch_size
        model.patch_embed = Stem(3, self.dim, side, stride=patch, padding=self.overlap)  # type: ignore[assignment]
        return model


# Without `build` an entry point of a plain orchestrator.ViTConfig(…) brings a new size of the ViTs that are there.
VIT_STEM = StemConfig(patch_size=8, dim=48, depth=2, num_heads=2, layer_scale_init=0.1)
