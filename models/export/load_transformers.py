"""Loads the model in this folder with transformers. Copy what you need of it. It needs transformers alone."""

from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel


def load(folder: str) -> Any:
    """The model in eval mode."""
    return AutoModel.from_pretrained(folder).eval()


@torch.inference_mode()
def features(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS (B, D) and patches (B, P, D), row by row, of normalised images (B, C, H, W)."""
    tokens = model(pixel_values=images).last_hidden_state
    first = 1 + getattr(model.config, "num_register_tokens", 0)  # a ConvNeXt has none
    return tokens[:, 0], tokens[:, first:]


def preprocess(folder: str, photo: Image.Image) -> torch.Tensor:
    """A photo as a normalised image (1, 3, S, S), of the size that the model was trained for."""
    processor = AutoImageProcessor.from_pretrained(folder)
    image: torch.Tensor = processor(photo.convert("RGB"), return_tensors="pt").pixel_values
    return image
