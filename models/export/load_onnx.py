"""Loads the model in this folder with ONNX Runtime. Copy what you need. It needs onnxruntime, numpy and Pillow."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(folder: str) -> onnxruntime.InferenceSession:
    """A session on the CPU; name other providers for other devices."""
    return onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])


def features(model: onnxruntime.InferenceSession, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CLS (B, D) and patches (B, P, D), row by row, of normalised float32 images (B, 3, H, W)."""
    cls, patches = model.run(["cls", "patches"], {"images": images})
    return cls, patches


def preprocess(folder: str, photo: Image.Image) -> np.ndarray:
    """A photo as a normalised image (1, 3, S, S), of the size that the model was trained for."""
    told = json.loads(Path(folder, "preprocessing.json").read_text())
    side = (told["size"], told["size"])
    pixels = np.asarray(ImageOps.fit(photo.convert("RGB"), side, Image.Resampling.BICUBIC), np.float32) / 255
    normalised = (pixels - np.float32(told["mean"])) / np.float32(told["std"])
    return normalised.transpose(2, 0, 1)[None]
