"""What a student's network from elsewhere costs: built once, and run on torch's meta device, which computes nothing.

There is no formula for a network of which nothing is known but its module. So it is built, on the CPU, as `check`
builds it; then operations and what waits for the backward pass are counted in a forward pass of shapes alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from orchestrator.models.network_spec import NetworkSpec

# BatchNorm in training wants more than one image.
_IMAGES = 2
# Training is in bf16 where memory matters; what is counted is in fp32.
_HALF = 2


@dataclass(frozen=True)
class NetworkCost:
    """What one image costs.

    Attributes:
        params: that are trained.
        unit: parameters of the largest module that ZeRO-3 fetches at once.
        dim: numbers of a feature.
        patch_size: pixels a side of what a patch stands for.
        flops: of a forward pass, by pixels a side.
        activation_bytes: that wait for the backward pass, in bf16, by pixels a side.
    """

    params: int
    unit: int
    dim: int
    patch_size: int
    flops: Mapping[int, float]
    activation_bytes: Mapping[int, float]


def network_cost(spec: NetworkSpec, size: int, others: Sequence[int] = ()) -> NetworkCost | None:
    """The cost of a network on square images; None if it cannot be built or counted, which `check` has words for.

    Args:
        spec: what makes it.
        size: pixels a side of the images that it is for.
        others: of further images that it sees.
    """
    try:
        return _counted(
            spec.library,
            spec.name,
            json.dumps(dict(spec.kwargs), sort_keys=True),
            size,
            tuple(others),
            spec.num_channels,
        )
    except Exception:  # a module of anybody may raise anything
        return None


@cache
def _counted(
    library: str, name: str, kwargs: str, size: int, others: tuple[int, ...], num_channels: int
) -> NetworkCost:
    import torch
    from torch import Tensor
    from torch.autograd.graph import saved_tensors_hooks
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from orchestrator.models.wrapped_backbone import build_wrapped, ready_to_train

    spec = NetworkSpec(library, name, json.loads(kwargs), num_channels=num_channels)
    backbone = build_wrapped(spec, size, 0)
    ready_to_train(backbone, *others)
    trained = [param for param in backbone.parameters() if param.requires_grad]
    unit = max(sum(one.numel() for one in module.parameters(recurse=False)) for module in backbone.modules())
    backbone.to("meta")
    own = {param.untyped_storage()._cdata for param in backbone.parameters()}
    flops: dict[int, float] = {}
    activations: dict[int, float] = {}
    for side in dict.fromkeys((size, *others)):
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            # Held, so that no other tensor gets its place.
            if tensor.untyped_storage()._cdata not in own:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        images = torch.empty(_IMAGES, spec.num_channels, side, side, device="meta")
        # Attention as matrix products: the counter does not know each of its faster forms.
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            backbone(images)
        flops[side] = counter.get_total_flops() / _IMAGES
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        activations[side] = held / _IMAGES / _HALF
    return NetworkCost(
        sum(param.numel() for param in trained), unit, backbone.dim, backbone.patch_size, flops, activations
    )
