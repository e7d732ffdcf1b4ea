"""What `align_text` leaves: photos, parts of photos and texts embedded in one space."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.models import (
    Backbone,
    BackboneFeatures,
    BertConfig,
    BertEncoder,
    BertTower,
    TextAligner,
    TextConfig,
    TextTower,
    load_pretrained,
    preprocess,
)
from orchestrator.stages.common.text_tokenizer import load_tokenizer

Floats = NDArray[np.float32]

# Format 2 had one way to project, and biases always.
FORMAT = 3
_FORMAT_2 = {"projection": "joint", "ffn_hidden": None, "qkv_bias": True}
_BATCH = 32


class Aligned:
    """A vision and a text tower in one space; made by :func:`load_aligned`, on the CPU.

    Attributes:
        image_size: pixels a side that photos are resized and cropped to.
        logit_scale: what cosines are multiplied by before a softmax.
        dim: width of the common space.
    """

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if record["format"] == 2:
            record |= {**_FORMAT_2, "format": FORMAT}
        if record["format"] != FORMAT:
            raise ValueError(f"{folder} has format {record['format']!r}; this version reads {FORMAT}")
        self.image_size, self.logit_scale = int(record["image_size"]), float(record["logit_scale"])
        self.dim = int(record["output_dim"])
        self._tower = load_pretrained(folder / "tower")
        self._tokenizer = load_tokenizer(folder / "tokenizer.json")
        self._aligner = TextAligner(
            self._tower.dim,
            self.dim,
            record["num_blocks"],
            pool=record["pool"],
            projection=record["projection"],
            hidden=record["ffn_hidden"],
            qkv_bias=record["qkv_bias"],
        ).eval()
        self._aligner.load_state_dict(load_file(folder / "aligner.safetensors"))
        self._text = _text_tower(record["text"], self.dim).eval()
        self._text.load_state_dict(load_file(folder / "text.safetensors"))

    @property
    def tower(self) -> Backbone:
        """The vision tower alone, whose features are not yet in the common space."""
        return self._tower

    @property
    def patch_size(self) -> int:
        """Pixels a side of what one patch stands for."""
        return int(self._tower.patch_size)

    @torch.no_grad()
    def embed_images(self, images: Sequence[NDArray[np.uint8]]) -> Floats:
        """Photos, uint8 (H, W, 3) of any size each → L2-normalised float32 (N, dim).

        Raises:
            ValueError: an array of another shape or dtype.
        """
        parts = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(images), _BATCH):
            features = self._features(images[start : start + _BATCH], self.image_size)
            parts.append(self.embed_features(features))
        return np.concatenate(parts)

    @torch.no_grad()
    def embed_features(self, features: BackboneFeatures) -> Floats:
        """Features of `tower`, of N photos → L2-normalised float32 (N, dim)."""
        return _unit(self._aligner(features))

    @torch.no_grad()
    def embed_patches(self, images: Sequence[NDArray[np.uint8]], size: int | None = None) -> list[Floats]:
        """Photos → the embeddings of their patches, L2-normalised float32 (h, w, dim) each.

        Args:
            images: uint8 (H, W, 3) of any size each.
            size: pixels a side that they are resized and cropped to; default: `image_size`.

        Raises:
            ValueError: an array of another shape or dtype, or a size that the patch does not divide.
        """
        size = size or self.image_size
        side = size // self.patch_size
        maps: list[Floats] = []
        for start in range(0, len(images), _BATCH):
            features = self._features(images[start : start + _BATCH], size)
            patches_BPD = _unit(self._aligner.patches(features))
            maps += [patches_PD.reshape(side, side, self.dim) for patches_PD in patches_BPD]
        return maps

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Texts → L2-normalised float32 (N, dim); what is longer than the context is cut."""
        parts = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(texts), _BATCH):
            encoded = [
                torch.tensor(self._tokenizer.encode(text).ids) for text in texts[start : start + _BATCH]
            ]
            lengths_B = torch.tensor([len(ids) for ids in encoded])
            tokens_BL = nn.utils.rnn.pad_sequence(encoded, batch_first=True)
            parts.append(_unit(self._text(tokens_BL, lengths_B)))
        return np.concatenate(parts)

    def embed_names(self, names: Sequence[str], templates: Sequence[str] = ("{}",)) -> Floats:
        """Names of classes → L2-normalised float32 (N, dim), each the mean over the templates' texts.

        The prompt ensemble of CLIP (arXiv 2103.00020, section 3.1.4): texts are normalised, averaged, and
        normalised again.

        Args:
            names: of the classes.
            templates: texts in which `{}` stands for the name.
        """
        texts = [template.replace("{}", name) for name in names for template in templates]
        mean_ND = self.embed_texts(texts).reshape(len(names), len(templates), self.dim).mean(axis=1)
        return _unit(torch.from_numpy(mean_ND))

    def _features(self, images: Sequence[NDArray[np.uint8]], size: int) -> BackboneFeatures:
        return BackboneFeatures(
            *self._tower(torch.cat([preprocess(image, size, self._tower) for image in images]))
        )


def load_aligned(folder: str | Path) -> Aligned:
    """What an `align_text` stage left in its `aligned` folder.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: it was written by another version.
    """
    return Aligned(Path(folder))


def _text_tower(record: dict[str, Any], output_dim: int) -> nn.Module:
    if record["kind"] == "causal":
        return TextTower(TextConfig(**record["shape"]))
    return BertTower(BertEncoder(BertConfig(**record["shape"])), output_dim)


def _unit(embeddings: Tensor) -> Floats:
    unit: Floats = F.normalize(embeddings.float(), dim=-1).numpy()
    return unit
