"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685): beside frozen weights, and merged into them at the end.

A layer y = W x becomes y = W x + (alpha / rank) · U D x with D (rank, in) and U (out, rank). D begins at random and U
at zero, so that training begins with the network as it was. Merged, the layer is one matrix again,
W + (alpha / rank) · U D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import QKV

# What networks call the modules around these layers: ours, timm's and transformers'.
GROUPS = {
    "attention": ("attention", "attn", "self_attn", "self_attention"),
    "mlp": ("mlp", "ffn", "feed_forward", "intermediate"),
}


class LowRank(nn.Module):
    """A linear layer with an adapter beside it.

    Args:
        base: the layer; it is frozen.
        rank: of the adapter.
        alpha: the adapter's output is multiplied by alpha / rank.
    """

    def __init__(self, base: nn.Linear | QKV, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        outputs, inputs = base.weight.shape
        self.scale = alpha / rank
        self.lora_down = nn.Parameter(torch.empty(rank, inputs))
        self.lora_up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """Of the layer without its adapter: networks ask layers for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        low = F.linear(F.linear(x, self.lora_down), self.lora_up)
        out: Tensor = self.base(x) + self.scale * low
        return out

    @torch.no_grad()
    def merged(self) -> nn.Linear | QKV:
        """The layer with its adapter in its own matrix; the product is computed in float64."""
        product = self.lora_up.double() @ self.lora_down.double()
        self.base.weight.copy_(self.base.weight.double() + self.scale * product)
        return self.base


def add_lora(net: nn.Module, targets: Sequence[str], rank: int, alpha: float) -> list[str]:
    """Freeze a network and give its layers adapters, in place.

    Args:
        net: the network.
        targets: `attention` and `mlp` for the linear layers in modules of such a name; any other text is the last part
            of a layer's own name, such as `q_proj`.
        rank: of the adapters, at most the smaller side of each layer.
        alpha: see :class:`LowRank`.

    Returns:
        The names of these layers, in the order of the network.

    Raises:
        ValueError: a target that no layer has, or a rank that is larger than a side of a layer.
    """
    net.requires_grad_(False)
    layers = dict(_linear_layers(net))
    found = {name: layer for name, layer in layers.items() if any(_is_meant(name, each) for each in targets)}
    for target in targets:
        if not any(_is_meant(name, target) for name in found):
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"no linear layer matches the target {target!r}; layers are called {', '.join(ends) or 'nothing'}"
            )
    for name, layer in found.items():
        side = min(layer.weight.shape)
        if rank > side:
            raise ValueError(f"rank {rank} is more than the smaller side of {name}, {side}")
        _put(net, name, LowRank(layer, rank, alpha))
    return list(found)


def train_vectors(net: nn.Module) -> None:
    """Train biases, the weights of norms and layer scales, which are all parameters of one dimension, in place."""
    for param in net.parameters():
        if param.ndim == 1:
            param.requires_grad_(True)


def merge_lora(net: nn.Module) -> None:
    """Put each adapter into the matrix beside it, in place: the network has the layers again that it had before."""
    for name, layer in [(name, each) for name, each in net.named_modules() if isinstance(each, LowRank)]:
        _put(net, name, layer.merged())


def _linear_layers(net: nn.Module) -> Iterator[tuple[str, nn.Linear | QKV]]:
    # `nn.MultiheadAttention` multiplies with the weights of its layers itself: an adapter there would not be asked.
    fused = {
        id(part)
        for each in net.modules()
        if isinstance(each, nn.MultiheadAttention)
        for part in each.modules()
    }
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Linear, QKV)) and id(layer) not in fused:
            yield name, layer


def _is_meant(name: str, target: str) -> bool:
    *around, last = name.split(".")
    return any(part in GROUPS[target] for part in around) if target in GROUPS else last == target


def _put(net: nn.Module, name: str, layer: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    parent: Any = net.get_submodule(above)
    setattr(parent, last, layer)
