"""Loads the model in this folder with ONNX Runtime. Copy what you need. It needs onnxruntime, numpy and Pillow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageOps


def load(folder: str) -> Any:
    """An InferenceSession on the CPU; name other providers for other devices."""
    return onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])


def features(model: Any, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """CLS (B, D) and patches (B, P, D), row by row, of normalised float32 images (B, C, H, W)."""
    found: list[NDArray[np.float32]] = model.run(["cls", "patches"], {"images": images})
    return found


def preprocess(folder: str, photo: Image.Image) -> NDArray[np.float32]:
    """A photo as a normalised image (1, 3, S, S), of the size that the model was trained for."""
    told = json.loads(Path(folder, "preprocessing.json").read_text())
    side = (told["size"], told["size"])
    pixels = np.asarray(ImageOps.fit(photo.convert("RGB"), side, Image.Resampling.BICUBIC), np.float32)
    normalised = (pixels / np.float32(255) - np.array(told["mean"], np.float32)) / np.array(
        told["std"], np.float32
    )
    image: NDArray[np.float32] = normalised.transpose(2, 0, 1)[None].astype(np.float32)
    return image
