"""Any backbone as a headless teacher: CLS and patches out of whatever its forward gives.

What a network gives is told apart by one probing forward on a square image of the size that it will see. Nothing is
guessed: an output that could mean two things, or none, is a ValueError that says what came out.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .convert.files import load_any, read_weights

_EXPECTED = (
    "a map (B, D, h, w), tokens (B, N, D) of a square grid with or without one CLS before, or cls and patches"
)


class Tokens(NamedTuple):
    """What a headless teacher says of images: cls (B, D) and patches (B, P, D), row-major over `grid`."""

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


class ForeignNet(nn.Module):
    """A frozen network in eval mode that gives :class:`Tokens`.

    Attributes:
        net: the network.
        dim: width of its features.
        grid: rows and columns of its patches at `size`.
        size: pixels a side of the images it takes.

    Args:
        net: any module that takes normalised images (B, 3, size, size).
        size: see above.
        call: how it is asked; default: its forward.
        num_prefix: tokens before the patches, where that is known.
        num_patches: tokens after those, where that is known instead.
        dim: width of its features, where that is known: tells channels from positions.
        has_cls: whether the first of the tokens before the patches stands for the whole image.

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
        num_patches: int | None = None,
        dim: int | None = None,
        has_cls: bool = True,
    ) -> None:
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        self.size = size
        self._call = call or net
        self._layout = _Layout(num_prefix, num_patches, dim, has_cls)
        probe = self._probe()
        self.dim, self.grid = probe.patches.shape[-1], probe.grid

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tokens:
        """Tokens of normalised images (B, 3, size, size), in the network's own precision."""
        return self._layout.read(self._call(images_BCHW))

    def train(self, mode: bool = True) -> ForeignNet:
        """Frozen: stays in eval mode."""
        return super().train(False)

    def _probe(self) -> Tokens:
        first = next(self.net.parameters(), torch.zeros(1))
        images_BCHW = torch.zeros(2, 3, self.size, self.size, device=first.device)
        try:
            out = self._call(images_BCHW)
        except Exception as error:
            what = f"it cannot take images of {self.size} x {self.size} pixels"
            raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
        tokens = self._layout.read(out)
        if len(tokens.cls) != 2 or tokens.cls.shape[1] != tokens.patches.shape[2]:
            got = f"cls {tuple(tokens.cls.shape)} and patches {tuple(tokens.patches.shape)}"
            raise ValueError(f"for 2 images it gives {got}; expected (2, D) and (2, P, D)")
        return tokens


@dataclass(frozen=True)
class _Layout:
    """How a network's output is read; see :class:`ForeignNet`."""

    num_prefix: int | None
    num_patches: int | None
    dim: int | None
    has_cls: bool

    def read(self, out: Any) -> Tokens:
        """Tokens of what the network gave.

        Raises:
            ValueError: says what that was.
        """
        cls, patches, is_told = _parts(out)
        if patches is None or not patches.is_floating_point() or patches.ndim not in (3, 4):
            raise ValueError(f"it gives {_described(out)}; expected {_EXPECTED}")
        if patches.ndim == 4:
            return self._map(cls, patches)
        num_prefix = 0 if is_told else self._prefix(patches.shape[1])
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

    def _prefix(self, num_tokens: int) -> int:
        """How many tokens come before the patches."""
        if self.num_prefix is not None:
            return self.num_prefix
        if self.num_patches is not None:
            return max(0, num_tokens - self.num_patches)
        # A sequence of a whole grid has no CLS in it; one more than a grid begins with it.
        return 1 if _side(num_tokens) is None else 0


def open_any(path: Path, size: int) -> ForeignNet:
    """A teacher of a folder of ours, or of weights in any layout that `convert.load_any` reads.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such weights, or they cannot take such images.
    """
    return ForeignNet(load_any(path).float(), size)


def open_timm(name: str, size: int, *, pretrained: bool = True) -> ForeignNet:
    """A teacher of timm: its `forward_features`, before any head.

    Args:
        name: as `timm.create_model` takes it.
        size: pixels a side; networks that are made for one size are told.
        pretrained: whether weights are fetched; without, they are random.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: no such model or weights, or it is not clear what it gives.
    """
    timm = importlib.import_module("timm")
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=0)
        if hasattr(net, "set_input_size"):
            net.set_input_size(img_size=(size, size))
    except Exception as error:  # what a name or a download can raise is not said anywhere
        raise ValueError(f"timm does not give {name!r}: {type(error).__name__}: {error}") from error
    return ForeignNet(
        net,
        size,
        call=net.forward_features,
        num_prefix=int(getattr(net, "num_prefix_tokens", 0)),
        dim=net.num_features,
        has_cls=getattr(net, "cls_token", None) is not None,
    )


def open_transformers(name: str, size: int) -> ForeignNet:
    """A teacher of transformers, with the weights that belong to it; of a model of image and text its vision tower.

    Args:
        name: of a model, or a local folder; safetensors only.
        size: pixels a side.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: no such model, or it is not clear what it gives.
    """
    transformers = importlib.import_module("transformers")
    try:
        model = transformers.AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except Exception as error:  # what a name or a download can raise is not said anywhere
        raise ValueError(f"transformers does not give {name!r}: {type(error).__name__}: {error}") from error
    net = getattr(model, "vision_model", model)
    patch = getattr(net.config, "patch_size", None)
    # Registers lie between CLS and patches: how many tokens are none of the grid follows from the patch.
    num_patches = (size // patch) ** 2 if isinstance(patch, int) else None
    call: Callable[[Tensor], Any] = net
    if "interpolate_pos_encoding" in inspect.signature(net.forward).parameters:
        call = partial(net, interpolate_pos_encoding=True)
    return ForeignNet(net, size, call=call, num_patches=num_patches)


def open_module(spec: str, weights: Path | None, size: int) -> ForeignNet:
    """A teacher made by a user's own function or class.

    Args:
        spec: `package.module:callable`; called without arguments it gives an `nn.Module`.
        weights: its whole state dict, as safetensors or as what `torch.save` wrote, read without running code.
        size: pixels a side.

    Raises:
        ValueError: nothing to call there, it gives no module, the weights do not fit it, or it is not clear what
            the module gives.
    """
    net = find_callable(spec)()
    if not isinstance(net, nn.Module):
        raise ValueError(f"{spec} gives {type(net).__name__}, not an nn.Module")
    if weights is not None:
        try:
            net.load_state_dict(read_weights(weights), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {spec}: {error}") from error
    return ForeignNet(net, size)


def find_callable(spec: str) -> Callable[[], Any]:
    """What `package.module:callable` names.

    Raises:
        ValueError: it does not import, or there is nothing to call.
    """
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a user's module may raise anything when it is imported
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{module} has nothing called {name!r} that can be called")
    made: Callable[[], Any] = found
    return made


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
