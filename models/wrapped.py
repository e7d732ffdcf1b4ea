"""Any network as a backbone: CLS and patches out of whatever its forward gives.

A headless teacher is a :class:`ForeignNet`, frozen; a student is a `WrappedBackbone` (`wrapped_backbone.py`).

What a network gives is told apart by one probing forward on a square image of the size that it will see. Nothing is
guessed: an output that could mean two things, or none, is a ValueError that says what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .convert.files import load_any
from .network_spec import Blocks
from .networks import Network, module_network, of_tower, timm_network, transformers_network

_RGB = 3
_EXPECTED = (
    "a map (B, D, h, w), tokens (B, N, D) of a square grid with or without one CLS before, or cls and patches"
)


class Tokens(NamedTuple):
    """What a headless teacher says of images: cls (B, D) and patches (B, P, D), row-major over `grid`."""

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


class WrappedNet(nn.Module):
    """A network from elsewhere, how it is asked, and how its output is read.

    Attributes:
        net: the network.
        dim: width of its features.
        grid: rows and columns of its patches at `size`.
        size: pixels a side of the images that it was probed with.

    Args:
        net: any module that takes normalised images (B, 3, size, size).
        size: see above.
        call: how it is asked; default: its forward.
        num_prefix: tokens before the patches, where that is known.
        patch: pixels a side of a patch, where that is known instead.
        dim: width of its features, where that is known: tells channels from positions.
        has_cls: whether the first of the tokens before the patches stands for the whole image.
        num_channels: of the images.

    Raises:
        ValueError: it cannot take such images, or what it gives is not clear.
    """

    def __init__(
        self,
        net: nn.Module,
        size: int,
        *,
        call: Callable[[Tensor], Any] | None = None,
        num_prefix: int | None = None,
        patch: int | None = None,
        dim: int | None = None,
        has_cls: bool = True,
        num_channels: int = 3,
    ) -> None:
        super().__init__()
        self.net = net
        self.num_channels = num_channels
        self.size = size
        self._call = call
        self._layout = _Layout(num_prefix, patch, dim, has_cls)
        probe = self.probe(size)
        self.dim, self.grid = probe.patches.shape[-1], probe.grid

    def read(self, images_BCHW: Tensor) -> Tokens:
        """Tokens of normalised square images (B, 3, size, size), in the network's own precision."""
        out = self.net(images_BCHW) if self._call is None else self._call(images_BCHW)
        return self._layout.read(out, images_BCHW.shape[-1])

    @torch.no_grad()
    def probe(self, size: int) -> Tokens:
        """What it gives for two black images of `size` pixels a side, in eval mode.

        Raises:
            ValueError: it cannot take them, or what it gives is not clear.
        """
        first = next(self.net.parameters(), torch.zeros(1))
        images_BCHW = torch.zeros(2, self.num_channels, size, size, device=first.device)
        was_training = self.net.training
        self.net.eval()
        try:
            out = self.net(images_BCHW) if self._call is None else self._call(images_BCHW)
        except Exception as error:
            what = f"it cannot take images of {size} x {size} pixels"
            if self.num_channels != _RGB:
                what += f" and {self.num_channels} channels"
            raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
        finally:
            self.net.train(was_training)
        tokens = self._layout.read(out, size)
        if len(tokens.cls) != 2 or tokens.cls.shape[1] != tokens.patches.shape[2]:
            got = f"cls {tuple(tokens.cls.shape)} and patches {tuple(tokens.patches.shape)}"
            raise ValueError(f"for 2 images it gives {got}; expected (2, D) and (2, P, D)")
        return tokens

    def takes(self, size: int) -> bool:
        """Whether it can be asked for images of `size` pixels a side."""
        try:
            self.probe(size)
        except ValueError:
            return False
        return True


class ForeignNet(WrappedNet):
    """A frozen network in eval mode that gives :class:`Tokens`; see :class:`WrappedNet`."""

    def __init__(self, net: nn.Module, size: int, **known: Any) -> None:
        super().__init__(net.requires_grad_(False).eval(), size, **known)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tokens:
        """Tokens of normalised images (B, 3, size, size), in the network's own precision."""
        return self.read(images_BCHW)

    def train(self, mode: bool = True) -> ForeignNet:
        """Frozen: stays in eval mode."""
        return super().train(False)


@dataclass(frozen=True)
class _Layout:
    """How a network's output is read; see :class:`WrappedNet`."""

    num_prefix: int | None
    patch: int | None
    dim: int | None
    has_cls: bool

    def read(self, out: Any, size: int) -> Tokens:
        """Tokens of what the network gave for images of `size` pixels a side.

        Raises:
            ValueError: says what that was.
        """
        cls, patches, is_told = _parts(out)
        if patches is None or not patches.is_floating_point() or patches.ndim not in (3, 4):
            raise ValueError(f"it gives {_described(out)}; expected {_EXPECTED}")
        if patches.ndim == 4:
            return self._map(cls, patches)
        num_prefix = 0 if is_told else self._prefix(patches.shape[1], size)
        side = _side(patches.shape[1] - num_prefix)
        if side is None:
            after = f"after {num_prefix} tokens in front, " if num_prefix else ""
            raise ValueError(f"it gives {_described(out)}: {after}no square grid of patches is left")
        patches_BPD = patches[:, num_prefix:]
        if num_prefix and self.has_cls:
            cls = patches[:, 0]
        return Tokens(_image(cls, patches_BPD), patches_BPD, (side, side))

    def _map(self, cls: Tensor | None, map_BCHW: Tensor) -> Tokens:
        if self.dim is not None and map_BCHW.shape[1] != self.dim and map_BCHW.shape[3] == self.dim:
            map_BCHW = map_BCHW.permute(0, 3, 1, 2)  # channels last, as in Swin
        patches_BPD = map_BCHW.flatten(2).transpose(1, 2)
        height, width = map_BCHW.shape[2:]
        return Tokens(_image(cls, patches_BPD), patches_BPD, (height, width))

    def _prefix(self, num_tokens: int, size: int) -> int:
        """How many tokens come before the patches."""
        if self.num_prefix is not None:
            return self.num_prefix
        if self.patch is not None:
            # Registers lie between CLS and patches: how many tokens are none of the grid follows from the patch.
            return max(0, num_tokens - (size // self.patch) ** 2)
        # A sequence of a whole grid has no CLS in it; one more than a grid begins with it.
        return 1 if _side(num_tokens) is None else 0


def wrapped(network: Network, size: int, num_channels: int = 3) -> ForeignNet:
    """A network as a teacher that sees images of `size` pixels a side; raises as :class:`WrappedNet`."""
    return ForeignNet(network.net, size, num_channels=num_channels, **network.known)


def open_any(path: Path, size: int, blocks: Blocks | None = None, num_channels: int = 3) -> ForeignNet:
    """A teacher of a folder of ours, or of weights in any layout that `convert.load_any` reads.

    Args:
        path: see `load_any`.
        size: pixels a side.
        blocks: whose features it gives; default: the last one's. So for the others below.
        num_channels: of the images that it sees. So for the others below.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such weights, they cannot take such images, or there is no such block.
    """
    return wrapped(of_tower(load_any(path).float(), blocks), size, num_channels)


def open_timm(
    name: str,
    size: int,
    *,
    pretrained: bool = True,
    kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
    num_channels: int = 3,
) -> ForeignNet:
    """A teacher of timm: its `forward_features`, before any head; arguments as of :func:`timm_network`.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: no such model or weights, or it is not clear what it gives.
    """
    network = timm_network(name, size, pretrained=pretrained, kwargs=kwargs, blocks=blocks)
    return wrapped(network, size, num_channels)


def open_transformers(
    name: str,
    size: int,
    kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
    num_channels: int = 3,
) -> ForeignNet:
    """A teacher of transformers, with the weights that belong to it; arguments as of :func:`transformers_network`.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: no such model, or it is not clear what it gives.
    """
    return wrapped(transformers_network(name, kwargs=kwargs, blocks=blocks), size, num_channels)


def open_module(
    spec: str,
    weights: Path | None,
    size: int,
    kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
    num_channels: int = 3,
) -> ForeignNet:
    """A teacher made by a user's own function or class; arguments as of :func:`module_network`.

    Raises:
        ValueError: nothing to call there, it gives no module, the weights do not fit it, or it is not clear what
            the module gives.
    """
    return wrapped(module_network(spec, weights, kwargs=kwargs, blocks=blocks), size, num_channels)


def _parts(out: Any) -> tuple[Tensor | None, Tensor | None, bool]:
    """What may be the image's feature, the tokens or the map, and whether the patches are told to be just these."""
    if isinstance(out, Tensor):
        return None, out, False
    for cls, patches in (("cls", "patches"), ("pooler_output", "last_hidden_state")):
        get = out.get if isinstance(out, Mapping) else partial(getattr, out)
        found = get(patches, None)
        if isinstance(found, Tensor):
            image = get(cls, None)
            return image if isinstance(image, Tensor) else None, found, patches == "patches"
    if isinstance(out, tuple) and len(out) == 2 and all(isinstance(part, Tensor) for part in out):
        return out[0], out[1], True
    return None, None, False


def _image(cls: Tensor | None, patches_BPD: Tensor) -> Tensor:
    """The image's feature (B, D): the given one, or the mean of the positions."""
    return patches_BPD.mean(dim=1) if cls is None else cls.flatten(1)


def _side(count: int) -> int | None:
    return isqrt(count) if count > 0 and isqrt(count) ** 2 == count else None


def _described(out: Any) -> str:
    if isinstance(out, Tensor):
        return f"{str(out.dtype).removeprefix('torch.')} {tuple(out.shape)}"
    if isinstance(out, Mapping):
        return "{" + ", ".join(f"{name}: {_described(value)}" for name, value in out.items()) + "}"
    if isinstance(out, (tuple, list)):
        return "(" + ", ".join(_described(value) for value in out) + ")"
    return type(out).__name__
