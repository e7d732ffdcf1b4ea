"""Loads the model in this folder with timm. Copy what you need of it. It needs timm alone."""

from typing import Any

import timm
import torch
from PIL import Image


def load(folder: str) -> Any:
    """The model in eval mode. `model(images)` gives CLS (B, D)."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.inference_mode()
def features(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS (B, D) and patches (B, P, D), row by row, of normalised images (B, C, H, W)."""
    tokens = model.forward_features(images)
    if tokens.ndim == 4:  # a ConvNeXt gives a map, and its norm is part of its head
        return model.forward_head(tokens), model.head.norm(tokens).flatten(2).transpose(1, 2)
    return tokens[:, 0], tokens[:, model.num_prefix_tokens :]


def preprocess(model: Any, photo: Image.Image) -> torch.Tensor:
    """A photo as a normalised image (1, 3, S, S), of the size that the model was trained for."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image: torch.Tensor = transform(photo.convert("RGB"))[None]
    return image
