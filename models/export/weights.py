"""Towers as weights and a config that timm or transformers build the model from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..configs import Config, ConvNeXtConfig, ViTConfig
from ..convert.layouts import to_layout
from ..convert.timm_config import timm_config
from ..convert.transformers_config import transformers_config
from ..pretrained import CONFIG, WEIGHTS
from ..towers import Backbone
from .formats import Preprocessing

_CLASSES = {"dinov3_vit": "DINOv3ViTModel", "dinov3_convnext": "DINOv3ConvNextModel"}
_BICUBIC = 3


def write_timm(model: Backbone, preprocessing: Preprocessing, folder: Path) -> None:
    """`model.safetensors`, and a `config.json` for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    built = timm_config(model.config)
    side = preprocessing.size
    record = {
        **built,
        "num_classes": 0,
        "num_features": model.dim,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [model.config.num_channels, side, side],
            "fixed_input_size": False,
            "pool_size": None,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            **_timm_names(model.config),
        },
        **preprocessing.extra(),
    }
    _write(model, "timm", record, folder)


def write_transformers(model: Backbone, preprocessing: Preprocessing, folder: Path) -> None:
    """`model.safetensors`, `config.json` and `preprocessor_config.json` for `AutoModel` and `AutoImageProcessor`."""
    record = transformers_config(model.config)
    record |= {"architectures": [_CLASSES[record["model_type"]]], "dtype": "float32"}
    record["image_size"] = preprocessing.size
    record |= preprocessing.extra()
    _write(model, "transformers", record, folder)
    side = preprocessing.size
    processor = {
        # The model's own processor stretches photos to squares; this one crops, as towers are trained.
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": preprocessing.is_rgb,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing.mean,
        "image_std": preprocessing.std,
    }
    _json(folder / "preprocessor_config.json", processor)


def _timm_names(config: Config) -> dict[str, str]:
    """Where timm finds the layers that it adapts to other channels or classes."""
    if isinstance(config, ConvNeXtConfig):
        return {"first_conv": "stem.0", "classifier": "head.fc"}
    assert isinstance(config, ViTConfig)
    return {"first_conv": "patch_embed.proj", "classifier": "head"}


def _write(model: Backbone, layout: str, record: Mapping[str, Any], folder: Path) -> None:
    state = to_layout(model.state_dict(), model.config, layout)
    weights = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    _json(folder / CONFIG, record)


def _json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
