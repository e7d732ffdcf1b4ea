"""Operations of towers and heads on the views of an image, in floating-point operations: 2 a multiply-add."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from orchestrator.data.views import CropConfig
from orchestrator.models.configs import Config, ViTConfig
from orchestrator.models.cost import forward_flops, head_flops
from orchestrator.stages.common.config import Heads

Views = Sequence[tuple[float, CropConfig]]
"""Sizes that a step may have, with their shares."""


def only_globals(view: tuple[float, CropConfig]) -> tuple[float, CropConfig]:
    """The same view, without local crops: what a teacher sees."""
    return view[0], view[1].model_copy(update={"num_local": 0})


def mean(views: Views, value: Callable[[CropConfig], float]) -> float:
    """The mean of a figure of the views, by their shares."""
    return fmean([value(crops) for _, crops in views], [share for share, _ in views])


def masked_share(probability: float, ratio: tuple[float, float], num_views: int) -> float:
    """Share of the patches of a block's `num_views` global views that are masked, but for rounding.

    Ratios are the upper ends of as many equal cells of `ratio` as there are masked views.
    """
    masked = math.floor(num_views * probability + 0.5)
    if not masked:
        return 0.0
    mean_ratio = (ratio[0] + ratio[1]) / 2 + (ratio[1] - ratio[0]) / (2 * masked)
    return masked / num_views * mean_ratio


def square_flops(config: Config, size: int) -> float:
    """Forward of one square picture of `size` pixels a side."""
    return float(forward_flops(config, size, size))


def tower_flops(config: Config, views: Views, taken: float = 1.0) -> float:
    """Forward of all views of an image; drop-path takes a share of the rows through each block."""

    def of(crops: CropConfig) -> float:
        flops = crops.num_global * square_flops(config, crops.global_size)
        return flops + (crops.num_local * square_flops(config, crops.local_size) if crops.num_local else 0.0)

    return taken * mean(views, of)


def heads_flops(dim: int, patch_size: int, heads: Heads, views: Views, masked: float) -> float:
    """Forward of both heads for an image: DINO for every view, iBOT for the `masked` share of the patches.

    Args:
        dim: of the features.
        patch_size: pixels a side of what a patch stands for.
        heads: their sizes.
        views: of the image.
        masked: share of the patches.
    """
    dino = head_flops(dim, heads.hidden, heads.dino_bottleneck, heads.dino_prototypes)
    ibot = head_flops(dim, heads.hidden, heads.ibot_bottleneck, heads.ibot_prototypes)

    def of(crops: CropConfig) -> float:
        return dino * (crops.num_global + crops.num_local) + ibot * masked * _patches(patch_size, crops)

    return mean(views, of)


def logits_per_image(patch_size: int, heads: Heads, views: Views, masked: float) -> tuple[float, float]:
    """Logits of an image: the student's and the teacher's; arguments as of :func:`heads_flops`."""

    def of(crops: CropConfig, rows: int) -> float:
        tokens = masked * _patches(patch_size, crops)
        return rows * heads.dino_prototypes + tokens * heads.ibot_prototypes

    student = mean(views, lambda crops: of(crops, crops.num_global + crops.num_local))
    return student, mean(views, lambda crops: of(crops, crops.num_global))


def largest_row(heads: Heads) -> int:
    """Prototypes of the wider head."""
    return max(heads.dino_prototypes, heads.ibot_prototypes)


def _patches(patch_size: int, crops: CropConfig) -> int:
    return crops.num_global * (crops.global_size // patch_size) ** 2


def num_tokens(config: Config, size: int) -> int:
    """Of a square picture, CLS and storage tokens among them."""
    prefix = 1 + config.num_storage_tokens if isinstance(config, ViTConfig) else 1
    return prefix + (size // config.patch_size) ** 2


def feature_dim(config: Config) -> int:
    """Numbers of a feature."""
    return config.dim if isinstance(config, ViTConfig) else config.dims[-1]


def blocks_flops(config: ViTConfig, tokens: int) -> float:
    """Forward of a transformer's blocks on a row of tokens."""
    matrices = block_params(config)
    return 2.0 * config.depth * (tokens * matrices + 2 * tokens**2 * config.dim)


def block_params(config: ViTConfig) -> int:
    """Entries of a block's matrices; its vectors are below one in a thousand."""
    hidden = config.ffn_hidden or 4 * config.dim
    return 4 * config.dim**2 + (3 if config.ffn == "swiglu" else 2) * config.dim * hidden
