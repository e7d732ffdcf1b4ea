"""Parameters and floating-point operations in closed form. Imports no torch: a plan of the 7B is instant.

One multiply-add counts as 2 operations. Counted are matrix products, attention and convolutions, as torch's
FlopCounterMode does; norms, activations, softmax, rotations and sums of residuals are not (below 1 % together).
Drop-path, masks and padding change nothing: it is the cost of a forward on whole rows. A backward costs twice that.
"""

from __future__ import annotations

from itertools import pairwise

from .configs import Config, ConvNeXtConfig, ViTConfig


def num_params(config: Config) -> int:
    """Parameters of a tower, the mask token and a separate local norm included."""
    return _vit_params(config) if isinstance(config, ViTConfig) else _convnext_params(config)


def forward_flops(config: Config, height: int, width: int) -> int:
    """Operations of one image's forward through a tower.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        ValueError: the patch does not divide the image.
    """
    if height % config.patch_size or width % config.patch_size:
        raise ValueError(
            f"image of {height} x {width} px is not a multiple of the patch, {config.patch_size} px"
        )
    if isinstance(config, ViTConfig):
        return _vit_flops(config, (height // config.patch_size) * (width // config.patch_size))
    return _convnext_flops(config, height, width)


def head_params(dim: int, hidden: int, bottleneck: int, num_prototypes: int) -> int:
    """Parameters of a :class:`PrototypeHead`."""
    biases = 2 * hidden + bottleneck
    return _head_weights(dim, hidden, bottleneck) + biases + bottleneck * num_prototypes


def head_flops(dim: int, hidden: int, bottleneck: int, num_prototypes: int) -> int:
    """Operations of one row's forward through a :class:`PrototypeHead`; with 0 prototypes, up to the bottleneck."""
    return 2 * (_head_weights(dim, hidden, bottleneck) + bottleneck * num_prototypes)


def _head_weights(dim: int, hidden: int, bottleneck: int) -> int:
    return dim * hidden + hidden * hidden + hidden * bottleneck


def _vit_params(config: ViTConfig) -> int:
    dim, hidden = config.dim, config.ffn_hidden or 4 * config.dim
    tokens = (2 + config.num_storage_tokens) * dim  # CLS, mask and storage
    patch_embed = (config.num_channels * config.patch_size**2 + 1) * dim
    norms = (2 + 2 * config.separate_local_norm) * dim
    ffn_biases = (2 if config.ffn == "swiglu" else 1) * hidden + dim
    # Queries, values and keys; projection; feed-forward.
    biases = (2 * config.qkv_bias + config.key_bias) * dim + dim + ffn_biases
    scales_and_norms = 2 * dim + 4 * dim
    block = _vit_block_weights(config) + biases + scales_and_norms
    return tokens + patch_embed + norms + config.depth * block


def _vit_flops(config: ViTConfig, num_patches: int) -> int:
    num_tokens = 1 + config.num_storage_tokens + num_patches
    attention = 2 * num_tokens**2 * config.dim  # scores, and the mix of values
    block = num_tokens * _vit_block_weights(config) + attention
    patch_embed = num_patches * config.num_channels * config.patch_size**2 * config.dim
    return 2 * (patch_embed + config.depth * block)


def _vit_block_weights(config: ViTConfig) -> int:
    """Entries of a block's matrices."""
    hidden = config.ffn_hidden or 4 * config.dim
    return 4 * config.dim**2 + (3 if config.ffn == "swiglu" else 2) * config.dim * hidden


def _convnext_params(config: ConvNeXtConfig) -> int:
    dims, depths = config.dims, config.depths
    mask_token = dims[0]
    stem = (3 * config.stem_stride**2 + 1) * dims[0] + 2 * dims[0]
    downsamples = sum(2 * before + (4 * before + 1) * after for before, after in pairwise(dims))
    # Depthwise 7 x 7, norm, up, down, LayerScale; each with its biases.
    blocks = sum(
        depth * (50 * dim + 2 * dim + (8 * dim**2 + 5 * dim) + dim)
        for dim, depth in zip(dims, depths, strict=True)
    )
    return mask_token + stem + downsamples + blocks + 2 * dims[-1]


def _convnext_flops(config: ConvNeXtConfig, height: int, width: int) -> int:
    multiply_adds, before = 0, 0
    for stage, (dim, depth) in enumerate(zip(config.dims, config.depths, strict=True)):
        stride = config.stem_stride * 2**stage
        per_cell = 4 * before * dim if stage else 3 * stride**2 * dim
        per_cell += depth * (49 * dim + 8 * dim**2)
        multiply_adds += (height // stride) * (width // stride) * per_cell
        before = dim
    return 2 * multiply_adds
