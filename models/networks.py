"""Networks from elsewhere (a user's module, timm, transformers), and what is known of how they are asked and read.

Teachers are made of them with their weights, students with random ones.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .convert.files import read_weights
from .convnext import ConvNeXt
from .hub import answering_hub
from .network_spec import Blocks, NetworkSpec
from .towers import Backbone

# Names that networks give the norm after their last block.
_NORMS = ("norm", "layernorm", "post_layernorm", "ln_post")


@dataclass(frozen=True)
class Network:
    """A network, and what is known of it.

    Attributes:
        net: the network.
        known: arguments of `WrappedNet` that say how it is asked and read.
    """

    net: nn.Module
    known: Mapping[str, Any]


def module_network(
    spec: str,
    weights: Path | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
) -> Network:
    """A network made by a user's own function or class.

    Args:
        spec: `package.module:callable`; called with `kwargs` it gives an `nn.Module`.
        weights: its whole state dict, as safetensors or as what `torch.save` wrote, read without running code.
        kwargs: see above.
        blocks: of a module with `blocks` and `get_intermediate_layers`, as DINO's networks have them.

    Raises:
        ValueError: nothing to call there, it does not take `kwargs`, it gives no module, the weights do not fit it, or
            the module has no such blocks.
    """
    make = find_callable(spec)
    try:
        net = make(**(kwargs or {}))
    except Exception as error:  # a user's function may raise anything
        given = ", ".join(f"{name}={value!r}" for name, value in (kwargs or {}).items())
        raise ValueError(f"{spec}({given}) fails: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{spec} gives {type(net).__name__}, not an nn.Module")
    if weights is not None:
        try:
            net.load_state_dict(read_weights(weights), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {spec}: {error}") from error
    if blocks is None:
        return Network(net, {})
    if not callable(getattr(net, "get_intermediate_layers", None)) or not hasattr(net, "blocks"):
        raise ValueError(
            f"{spec} gives {type(net).__name__}, which does not offer its blocks: it needs `blocks` and the method "
            "get_intermediate_layers(images, n, return_class_token, norm), as DINO's networks have them"
        )
    indices = blocks.indices(len(net.blocks))  # type: ignore[arg-type]
    return Network(net, {"call": partial(_of_module, net, indices)})


def timm_network(
    name: str,
    size: int,
    *,
    pretrained: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
) -> Network:
    """A network of timm: its `forward_features`, before any head.

    Args:
        name: as `timm.create_model` takes it.
        size: pixels a side; networks that are made for one size are told.
        pretrained: whether weights are fetched; without, they are random.
        kwargs: further arguments of `timm.create_model`.
        blocks: of a vision transformer.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: no such model or weights, or no such blocks.
    """
    timm = importlib.import_module("timm")
    try:
        with answering_hub(name) if pretrained else nullcontext():
            net = timm.create_model(name, pretrained=pretrained, num_classes=0, **(kwargs or {}))
        if hasattr(net, "set_input_size"):
            net.set_input_size(img_size=(size, size))
    except Exception as error:  # what a name or a download can raise is not said anywhere
        raise ValueError(f"timm does not give {name!r}: {type(error).__name__}: {error}") from error
    if blocks is not None:
        if not hasattr(net, "blocks") or not hasattr(net, "forward_intermediates"):
            raise ValueError(f"timm's {name} is not a transformer with blocks to choose from")
        indices = blocks.indices(len(net.blocks))
        return Network(net, {"call": partial(_of_timm, net, indices)})
    # As its forward, so that a call of the network runs the hooks by which ZeRO-3 fetches its weights.
    net.forward = net.forward_features
    return Network(
        net,
        {
            "num_prefix": int(getattr(net, "num_prefix_tokens", 0)),
            "dim": net.num_features,
            "has_cls": getattr(net, "cls_token", None) is not None,
        },
    )


def transformers_network(
    name: str | Mapping[str, Any],
    *,
    pretrained: bool = True,
    kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
) -> Network:
    """A network of transformers; of a model of image and text its vision tower. No code of its author is run.

    Args:
        name: of a model, or a local folder; without weights also what its config.json says.
        pretrained: whether its weights are loaded, from safetensors only; without, they are random.
        kwargs: settings of its config that are replaced.
        blocks: of a vision transformer.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: no such model, or no such blocks.
    """
    transformers = importlib.import_module("transformers")
    shown = name if isinstance(name, str) else name.get("model_type")
    try:
        if pretrained:
            with answering_hub(str(name)):
                model = transformers.AutoModel.from_pretrained(
                    name, use_safetensors=True, trust_remote_code=False, **(kwargs or {})
                )
        else:
            if isinstance(name, str):
                with answering_hub(name):
                    config = transformers.AutoConfig.from_pretrained(
                        name, trust_remote_code=False, **(kwargs or {})
                    )
            else:
                fields = {key: value for key, value in name.items() if key != "model_type"}
                config = transformers.AutoConfig.for_model(name["model_type"], **fields)
            model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # what a name or a download can raise is not said anywhere
        raise ValueError(f"transformers does not give {shown!r}: {type(error).__name__}: {error}") from error
    net = getattr(model, "vision_model", model)
    patch = getattr(net.config, "patch_size", None)
    call: Callable[..., Any] = net
    if "interpolate_pos_encoding" in inspect.signature(net.forward).parameters:
        call = partial(net, interpolate_pos_encoding=True)
    if blocks is None:
        known = {"patch": patch if isinstance(patch, int) else None}
        return Network(net, known | ({} if call is net else {"call": call}))
    num_blocks = getattr(net.config, "num_hidden_layers", None)
    if not isinstance(patch, int) or not isinstance(num_blocks, int):
        raise ValueError(f"transformers' {shown} is not a transformer with blocks to choose from")
    indices = blocks.indices(num_blocks)
    norm = next(
        (found for each in _NORMS if isinstance(found := getattr(net, each, None), nn.LayerNorm)), None
    )
    return Network(net, {"call": partial(_of_transformers, call, norm, patch, indices, num_blocks)})


def random_network(spec: NetworkSpec, size: int) -> Network:
    """The network of a spec, freshly initialised from torch's global generator.

    Args:
        spec: what makes it.
        size: pixels a side of what it will see.

    Raises:
        ModuleNotFoundError: its library is not installed.
        ValueError: there is no such network.
    """
    if spec.library == "module":
        return module_network(spec.name, kwargs=spec.arguments)
    if spec.library == "timm":
        return timm_network(spec.name, size, kwargs=spec.arguments)
    if spec.config is not None:
        return transformers_network(spec.config, pretrained=False)
    return transformers_network(spec.name, pretrained=False, kwargs=spec.arguments)


def of_tower(tower: Backbone, blocks: Blocks | None = None) -> Network:
    """A tower of ours; of a ConvNeXt the stages count as blocks.

    Raises:
        ValueError: no such blocks.
    """
    if blocks is None:
        return Network(tower, {})
    indices = blocks.indices(len(tower.stages if isinstance(tower, ConvNeXt) else tower.blocks))
    return Network(tower, {"call": partial(_of_tower, tower, indices)})


def find_callable(spec: str) -> Callable[..., Any]:
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
    made: Callable[..., Any] = found
    return made


# --- tokens of single blocks, each after the network's final norm ---------------------------------------------------


def _of_tower(tower: Backbone, indices: tuple[int, int], images_BCHW: Tensor) -> dict[str, Tensor]:
    of_cls, of_patches = tower.features(images_BCHW, layers=indices)
    return {"cls": of_cls.cls, "patches": of_patches.patches}


def _of_module(net: Any, indices: tuple[int, int], images_BCHW: Tensor) -> dict[str, Any]:
    """`n` is a list of indices from 0; the answer has (patches, CLS) for each, in the order of the network."""
    found = _each(
        indices, lambda n: net.get_intermediate_layers(images_BCHW, n=n, return_class_token=True, norm=True)
    )
    return {"cls": found[indices[0]][1], "patches": found[indices[1]][0]}


def _of_timm(net: Any, indices: tuple[int, int], images_BCHW: Tensor) -> dict[str, Tensor]:
    found = _each(
        indices,
        lambda n: net.forward_intermediates(
            images_BCHW,
            indices=n,
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        ),
    )
    patches_BPD, prefix_BSD = found[indices[0]]
    has_cls = getattr(net, "cls_token", None) is not None
    cls_BD = prefix_BSD[:, 0] if has_cls else patches_BPD.mean(dim=1)
    return {"cls": cls_BD, "patches": found[indices[1]][0]}


def _of_transformers(
    call: Callable[..., Any],
    norm: nn.LayerNorm | None,
    patch: int,
    indices: tuple[int, int],
    num_blocks: int,
    images_BCHW: Tensor,
) -> dict[str, Tensor]:
    out = call(images_BCHW, output_hidden_states=True)

    def tokens(index: int) -> Tensor:
        if index == num_blocks - 1:
            return out.last_hidden_state  # type: ignore[no-any-return]
        tokens_BND: Tensor = out.hidden_states[index + 1]  # the first is of the embedding
        return norm(tokens_BND) if norm is not None else F.layer_norm(tokens_BND, tokens_BND.shape[-1:])

    num_prefix = out.last_hidden_state.shape[1] - (images_BCHW.shape[-1] // patch) ** 2
    of_cls, of_patches = tokens(indices[0]), tokens(indices[1])
    cls_BD = of_cls[:, 0] if num_prefix > 0 else of_cls.mean(dim=1)
    return {"cls": cls_BD, "patches": of_patches[:, max(0, num_prefix) :]}


def _each(indices: Sequence[int], ask: Callable[[list[int]], Sequence[Any]]) -> dict[int, Any]:
    """What a network gives for some of its blocks, by index; each is asked for once."""
    wanted = sorted(set(indices))
    return dict(zip(wanted, ask(wanted), strict=True))
