"""Towers of timm and transformers by name: their own loaders find the weights, and ours takes them over."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..hub import answering_hub
from ..towers import Backbone, from_config
from .layouts import State, from_layout
from .transformers_config import known_from_transformers


def from_timm(name: str) -> Backbone:
    """The tower of a pretrained model of timm, on the CPU, in eval mode.

    Args:
        name: as `timm.create_model` takes it.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: no such model or weights, or as :func:`from_layout`.
    """
    timm = _imported("timm")
    try:
        with answering_hub(name):
            net = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # what a name or a download can raise is not said anywhere
        raise ValueError(f"timm does not give {name!r}: {type(error).__name__}: {error}") from error
    blocks = getattr(net, "blocks", None)
    known = {"num_heads": blocks[0].attn.num_heads} if blocks is not None else {}
    return _tower(net.state_dict(), "timm", **known)


def from_transformers(name: str) -> Backbone:
    """The tower of a pretrained model of transformers, on the CPU, in eval mode.

    Args:
        name: of a model; safetensors only.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: no such model or weights, or as :func:`from_layout`.
    """
    transformers = _imported("transformers")
    try:
        with answering_hub(name):
            net = transformers.AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except Exception as error:  # what a name or a download can raise is not said anywhere
        raise ValueError(f"transformers does not give {name!r}: {type(error).__name__}: {error}") from error
    return _tower(net.state_dict(), "transformers", **known_from_transformers(net.config.to_dict()))


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # an installation may be broken in any way
        what = f"{package} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(what) from error


def _tower(state: State, layout: str, **known: object) -> Backbone:
    config, own = from_layout(state, layout, **known)
    with torch.device("meta"):
        model = from_config(config)
    model.load_state_dict(own, assign=True)
    return model.eval()
