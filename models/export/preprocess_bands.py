"""From the bands of a file to what the model in this folder takes. Copy what you need. It needs numpy and Pillow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


def preprocess(folder: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """Values of a file (H, W, bands), all of its bands, as a normalised image (1, C, S, S).

    S is the size that the model was trained for; C its channels, which are the bands that `preprocessing.json` names.
    """
    told = json.loads(Path(folder, "preprocessing.json").read_text())
    pixels = told.get("pixels", {})
    chosen = values[:, :, pixels["bands"]] if "bands" in pixels else values
    if "range" in pixels:
        black, white = pixels["range"]
    else:
        black, white = 0, np.iinfo(chosen.dtype).max
    shares = np.nan_to_num((chosen.astype(np.float32) - np.float32(black)) / np.float32(white - black))
    side = (told["size"], told["size"])
    squares = [
        np.asarray(ImageOps.fit(Image.fromarray(band), side, Image.Resampling.BICUBIC))
        for band in shares.clip(0, 1).transpose(2, 0, 1)
    ]
    mean, std = (np.array(told[name], np.float32)[:, None, None] for name in ("mean", "std"))
    image: NDArray[np.float32] = ((np.stack(squares).clip(0, 1) - mean) / std)[None].astype(np.float32)
    return image
