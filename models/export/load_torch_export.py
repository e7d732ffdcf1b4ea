"""Loads the model in this folder with torch.export. Copy what you need of it. It needs torch, numpy and Pillow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


def load(folder: str) -> Any:
    """The model. torch.export.load can run code that is in a file: load what you made, or what you trust."""
    return torch.export.load(f"{folder}/model.pt2").module()


@torch.inference_mode()
def features(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS (B, D) and patches (B, P, D), row by row, of normalised images (B, C, H, W)."""
    cls, patches = model(images)
    return cls, patches


def preprocess(folder: str, photo: Image.Image) -> torch.Tensor:
    """A photo as a normalised image (1, 3, S, S), of the size that the model was trained for."""
    told = json.loads(Path(folder, "preprocessing.json").read_text())
    side = (told["size"], told["size"])
    pixels = np.asarray(ImageOps.fit(photo.convert("RGB"), side, Image.Resampling.BICUBIC), np.float32) / 255
    normalised = (pixels - np.array(told["mean"], np.float32)) / np.array(told["std"], np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1)[None]
