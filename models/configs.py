"""The shapes of towers, as plain dataclasses: nothing here imports torch, so a pipeline file is checked fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

FFN = Literal["mlp", "swiglu"]

RGB = 3
"""Channels of an image unless something else is said."""

# Beyond any model: a config out of a file must not make somebody build blocks for hours.
_MAX = {"dim": 2**20, "dims": 2**20, "depth": 4096, "depths": 4096}
_MAX_OTHER = 2**14


def _check_whole(**values: object) -> None:
    """Raises ValueError unless each value is a whole number, or a tuple of them, within bounds."""
    for name, value in values.items():
        most = _MAX.get(name, _MAX_OTHER)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, bool) or not isinstance(one, int) or abs(one) > most:
                raise ValueError(f"{name} is {one!r:.40}; it must be a whole number up to {most}")


def _check_channels(num_channels: int) -> None:
    if num_channels < 1:
        raise ValueError(f"num_channels is {num_channels}; it must be at least 1")


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer.

    Attributes:
        patch_size: pixels a side.
        ffn_hidden: hidden width of the feed-forward; None is 4 · dim.
        qkv_bias: biases on queries and values.
        key_bias: biases on keys, too; needs `qkv_bias`.
        drop_path: share of rows that skip each residual branch in training, the same for all blocks.
        rope_rescale: limit r of the box jitter, a log-uniform factor in [1/r, r] of the patch coordinates
            drawn for each block in training; None is off.
        separate_local_norm: in training, norm the CLS and storage tokens of local crops by their own norm.
        num_channels: of its images.
    """

    patch_size: int = 16
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    ffn: FFN = "mlp"
    ffn_hidden: int | None = None
    num_storage_tokens: int = 4
    layer_scale_init: float = 1e-5
    drop_path: float = 0.0
    qkv_bias: bool = True
    key_bias: bool = False
    norm_eps: float = 1e-5
    rope_base: float = 100.0
    rope_rescale: float | None = 2.0
    separate_local_norm: bool = False
    num_channels: int = 3

    def __post_init__(self) -> None:
        _check_whole(dim=self.dim, depth=self.depth, num_heads=self.num_heads, patch_size=self.patch_size,
                     num_storage_tokens=self.num_storage_tokens, num_channels=self.num_channels)  # fmt: skip
        if self.dim < 1 or self.num_heads < 1 or self.depth < 1:
            raise ValueError(
                f"dim {self.dim}, depth {self.depth}, num_heads {self.num_heads}: each must be at least 1"
            )
        if self.dim % (4 * self.num_heads):
            raise ValueError(f"dim {self.dim} is not a multiple of 4 x num_heads = {4 * self.num_heads}")
        if self.ffn not in ("mlp", "swiglu"):
            raise ValueError(f"ffn is {self.ffn!r}; it must be 'mlp' or 'swiglu'")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be in [0, 1)")
        if self.rope_rescale is not None and self.rope_rescale < 1:
            raise ValueError(
                f"rope_rescale is {self.rope_rescale}; it must be at least 1, or null for no rescaling"
            )
        if self.key_bias and not self.qkv_bias:
            raise ValueError("key_bias needs qkv_bias: set qkv_bias to true, or leave key_bias out")
        if self.patch_size < 1 or self.num_storage_tokens < 0 or self.norm_eps <= 0:
            raise ValueError(
                f"patch_size {self.patch_size}, num_storage_tokens {self.num_storage_tokens}, norm_eps "
                f"{self.norm_eps}: they must be at least 1, at least 0, and above 0"
            )
        _check_channels(self.num_channels)


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Shape of a ConvNeXt of four stages.

    Attributes:
        drop_path: share of rows that skip the last block in training; rises linearly from 0 at the first.
        stem_stride: pixels a side of a stem cell; the total stride is 8 times that.
        num_channels: of its images.
    """

    depths: tuple[int, int, int, int] = (3, 3, 9, 3)
    dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    drop_path: float = 0.0
    layer_scale_init: float = 1e-6
    stem_stride: int = 4
    norm_eps: float = 1e-6
    num_channels: int = 3

    @property
    def patch_size(self) -> int:
        """Pixels a side of one cell of the final map: the total stride."""
        return 8 * self.stem_stride

    def __post_init__(self) -> None:
        _check_whole(
            depths=self.depths,
            dims=self.dims,
            stem_stride=self.stem_stride,
            num_channels=self.num_channels,
        )
        _check_channels(self.num_channels)
        if (
            len(self.depths) != 4
            or len(self.dims) != 4
            or min(*self.depths, *self.dims, self.stem_stride) < 1
        ):
            raise ValueError(
                f"depths {self.depths}, dims {self.dims}: need four stages of at least one block"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be in [0, 1)")


def record(config: ViTConfig | ConvNeXtConfig) -> dict[str, Any]:
    """The fields of a config for a file: `num_channels` only where it is not 3, as before there was that field."""
    fields = asdict(config)
    if config.num_channels == RGB:
        del fields["num_channels"]
    return fields


Config = ViTConfig | ConvNeXtConfig
"""A shape. A user's package may derive a class that adds `build()`, which makes its own tower, and a `version`."""


def swiglu_hidden(dim: int) -> int:
    """8/3 dim, rounded up to a multiple of 8: a SwiGLU with as many parameters as an MLP of 4 dim."""
    return -(-8 * dim // 24) * 8
