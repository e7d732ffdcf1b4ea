"""How MLflow loads our models: `mlflow.pyfunc.load_model` and `mlflow models serve` call `_load_pyfunc`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.decode import Pixels, UnreadableImage, decode_rgb, square

Floats = NDArray[np.float32]
_BATCH = 32
# Of models that do not say what they were trained at.
_SIZE = 224


class Embedder:
    """Embeds the column `image` of what MLflow hands over.

    Args:
        embed: squares of pixels → their vectors.
        size: pixels a side of the squares.
        pixels: how the values of files are seen; None for 8-bit RGB.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[Pixels]], Floats],
        size: int,
        pixels: PixelFormat | None = None,
    ) -> None:
        self._embed, self._size, self._pixels = embed, size, pixels

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Floats:
        """Photos → float32 (N, D), unit length, row by row.

        Args:
            model_input: a data frame with a column `image`: bytes of image files of a format that
                the project decodes (docs/photos.md), or base64 of them. They are seen as in `evaluate`.
            params: none are known.

        Raises:
            ValueError: there is no such column, or a cell that is not a picture.
        """
        try:
            cells = list(model_input["image"])
        except (KeyError, TypeError, IndexError):
            raise ValueError(
                "the input needs a column `image` with the bytes of a photo in each row"
            ) from None
        photos = [_decode(cell, row, self._size, self._pixels) for row, cell in enumerate(cells)]
        parts = [self._embed(photos[start : start + _BATCH]) for start in range(0, len(photos), _BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _load_pyfunc(path: str) -> Embedder:
    """MLflow's entry point. `path` is a folder of `save_pretrained`, or what `align_text` leaves in `aligned`."""
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text())
    return _aligned(folder) if "output_dim" in config else _backbone(folder, config)


def _backbone(folder: Path, config: Mapping[str, Any]) -> Embedder:
    import torch

    from orchestrator.models import load_pretrained, preprocess
    from orchestrator.models.wrapped_backbone import is_wrapped, load_wrapped

    # A module of somebody's is not imported here: whoever wants that calls `orchestrator.load`.
    model = load_wrapped(folder) if is_wrapped(folder) else load_pretrained(folder)
    size = int(config["extra"].get("image_size", _SIZE))

    @torch.no_grad()
    def embed(photos: Sequence[Pixels]) -> Floats:
        features = model(torch.cat([preprocess(photo, size, model) for photo in photos]))
        unit: Floats = torch.nn.functional.normalize(features.cls.float(), dim=-1).numpy()
        return unit

    told = config.get("pixels")
    return Embedder(embed, size, told and PixelFormat.model_validate(told))


def _aligned(folder: Path) -> Embedder:
    from orchestrator.stages.common.aligned import load_aligned

    model = load_aligned(folder)
    return Embedder(model.embed_images, model.image_size)


def _decode(cell: Any, row: int, size: int, pixels: PixelFormat | None) -> Pixels:
    """The square of a cell's image. Only formats that training decodes are: Pillow would start programs for others."""
    try:
        data = base64.b64decode(cell, validate=True) if isinstance(cell, str) else bytes(cell)
        return square(decode_rgb(data, f"row {row}", 2 * size, pixels=pixels), size)
    except UnreadableImage as error:
        raise ValueError(f"row {row} of `image` is not an image: {error.reason}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"row {row} of `image` is not an image: {error}") from None
