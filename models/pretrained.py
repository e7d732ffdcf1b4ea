"""Trained towers as folders (model.safetensors, config.json), and the way from a photo to a vector."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .configs import RGB, Config, ConvNeXtConfig, ViTConfig
from .configs import record as config_record
from .network_spec import LIBRARIES
from .pixels import MEAN, STD, normalise, num_channels_of, set_stats
from .presets import preset
from .towers import Backbone, from_config
from .vit import BackboneFeatures, Layers

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1
_ARCHITECTURES = {ViTConfig: "vit", ConvNeXtConfig: "convnext"}
# The class of the config is that of the installed package which has the preset.
_OWN = "preset"

ImageLike = Image.Image | npt.NDArray[np.uint8]


def save_pretrained(
    folder: str | Path,
    module_state: Mapping[str, Tensor],
    preset_name: str,
    extra: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> None:
    """Writes a tower so that :func:`load_pretrained` can rebuild it without the preset table.

    Args:
        folder: made if missing. Each file is written beside its name and renamed; config.json comes last, so
            a folder that has one is complete.
        module_state: the tower's whole state dict, in any dtype.
        preset_name: the preset it was built from.
        extra: JSON values for the reader (provenance, image size …), kept under "extra".
        overrides: the preset's fields that were replaced when it was built.
        pixels: JSON values of how files are seen: `mean` and `std` of its input, None for ImageNet's; and for those
            who read files `bands` and `range`.

    Raises:
        ValueError: unknown preset or field, or the state does not fit the tower they name.
    """
    config = preset(preset_name, **(overrides or {}))
    _check_state(module_state, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module_state.items()}
    partial = folder / (WEIGHTS + ".partial")
    save_file(weights, partial, metadata={"format": "pt"})
    settle(partial, folder / WEIGHTS)
    record = {
        "format": FORMAT,
        "architecture": _ARCHITECTURES.get(type(config), _OWN),
        "preset": preset_name,
        "config": config_record(config),
        **pixels_record(pixels),
        "extra": dict(extra or {}),
    }
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    settle(partial, folder / CONFIG)


def load_pretrained(folder: str | Path) -> Backbone:
    """The tower that :func:`save_pretrained` wrote, on the CPU, in eval mode, in its stored dtype.

    Raises:
        FileNotFoundError: no such folder, or not a finished one.
        ValueError: the folder is of a newer format, or weights and config do not fit.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a pretrained model: it has no {name}")
    record = _record_of(folder)
    config = read_config(record)
    state = load_file(folder / WEIGHTS)
    _check_state(state, config)
    model = _without_weights(config, record)
    model.load_state_dict(state, assign=True)
    return model.eval()


def pretrained_without_weights(folder: Path) -> Backbone:
    """The tower that :func:`save_pretrained` wrote, without its weights: its parameters are on the device `meta`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder is of a newer format.
    """
    record = _record_of(folder)
    return _without_weights(read_config(record), record)


def _record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} has format {record.get('format')!r}; this version reads {FORMAT}"
        )
    return record


def _without_weights(config: Config, record: Mapping[str, Any]) -> Backbone:
    with torch.device("meta"):
        model = from_config(config)
    set_stats(model, record.get("mean"), record.get("std"))
    return model


def pixels_record(pixels: Mapping[str, Any] | None) -> dict[str, Any]:
    """What config.json says of pixels: mean and deviation, and bands and range where there are some."""
    told = dict(pixels or {})
    mean, std = told.pop("mean", None) or MEAN, told.pop("std", None) or STD
    told = {name: value for name, value in told.items() if value is not None}
    return {"mean": mean, "std": std} | ({"pixels": told} if told else {})


def preprocess(image: ImageLike, size: int, tower: nn.Module | None = None) -> Tensor:
    """Upright RGB, shorter side resized to `size` (bicubic, antialiased), centre crop, normalised.

    Args:
        image: a PIL image (transparency is laid on white), or uint8 or uint16 (H, W, C), C the tower's channels.
        size: pixels a side.
        tower: which sees it, see :func:`normalise`.

    Returns:
        fp32 (1, C, size, size).

    Raises:
        ValueError: an array of another shape or dtype, or an image of more than 8 bits a channel.
    """
    channels = num_channels_of(tower) if tower is not None else RGB
    if isinstance(image, np.ndarray):
        known = image.dtype in (np.uint8, np.uint16)
        if not known or image.ndim != 3 or image.shape[2] != channels:
            raise ValueError(f"image is {image.dtype} {image.shape}; expected uint8 (H, W, {channels})")
        if image.dtype == np.uint16 or channels != RGB:
            # Pillow has no images of three channels of 16 bits, and takes a fourth channel for transparency.
            planes = [
                np.asarray(ImageOps.fit(Image.fromarray(plane_HW), (size, size), Image.Resampling.BICUBIC))
                for plane_HW in (image if image.dtype == np.uint8 else image.astype(np.float32)).transpose(
                    2, 0, 1
                )
            ]
            seen = torch.from_numpy(np.stack(planes))
            if image.dtype == np.uint16:
                seen = seen.clamp(0, 65535).round().to(torch.uint16)
            return normalise(seen[None], tower)
        image = Image.fromarray(image)
    if channels != RGB:
        raise ValueError(f"a PIL image has no {channels} channels: give an array (H, W, {channels})")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"image has mode {image.mode}; scale it to 8 bits a channel first")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    cropped = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return normalise(torch.from_numpy(np.array(cropped)).permute(2, 0, 1)[None], tower)


@torch.no_grad()
def embed(model: Backbone, image: ImageLike, size: int) -> Tensor:
    """The image's vector: the L2-normalised CLS feature, fp32 (D,), on the model's device.

    Args:
        model: a tower in eval mode.
        image: see :func:`preprocess`.
        size: pixels a side; a multiple of `model.patch_size`.

    Raises:
        ValueError: `size` does not fit the patch, or the array is not an RGB image.
    """
    device = next(model.parameters()).device
    features: BackboneFeatures = model(preprocess(image, size, model).to(device))
    return F.normalize(features.cls[0].float(), dim=0)


@torch.no_grad()
def embed_many(
    model: Backbone, images: Sequence[Tensor], layers: Layers = None, batch: int = 32
) -> list[list[BackboneFeatures]]:
    """Features of images of unlike sizes: those of one size go through the tower together.

    Args:
        model: a tower in eval mode.
        images: float (3, H, W) each, normalised; `model.patch_size` divides H and W.
        layers: see `features` of the towers.
        batch: the most images in one forward.

    Returns:
        For each image, in the given order, one :class:`BackboneFeatures` of batch 1 for each layer.

    Raises:
        ValueError: an image that is none or that the patch does not divide, or no such layer.
    """
    device = next(model.parameters()).device
    of_size: dict[torch.Size, list[int]] = {}
    for index, image_CHW in enumerate(images):
        if image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
            raise ValueError(f"image {index} is {tuple(image_CHW.shape)}; expected (3, H, W)")
        of_size.setdefault(image_CHW.shape, []).append(index)
    found: dict[int, list[BackboneFeatures]] = {}
    for indices in of_size.values():
        for first in range(0, len(indices), batch):
            chunk = indices[first : first + batch]
            together = model.features(torch.stack([images[index] for index in chunk]).to(device), layers)
            for row, index in enumerate(chunk):
                found[index] = [
                    BackboneFeatures(*(part[row : row + 1] for part in layer)) for layer in together
                ]
    return [found[index] for index in range(len(images))]


def read_config(record: Mapping[str, Any]) -> Config:
    """The config of a tower from what its config.json says.

    Raises:
        ValueError: it is of a package that is not installed here, or describes no tower.
    """
    if record.get("architecture") in LIBRARIES:
        raise ValueError(
            f"this is a network from elsewhere ({record.get('preset')!s:.100}), not a model of this package: "
            "orchestrator.load loads it"
        )
    if not isinstance(record.get("config"), dict) or record.get("architecture") not in (
        "vit",
        "convnext",
        _OWN,
    ):
        raise ValueError(
            f"architecture {record.get('architecture')!r:.40}: it must be 'vit' or 'convnext', with its `config`"
        )
    # JSON has no tuples, and the configs compare and hash by their fields.
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in record["config"].items()
    }
    if record["architecture"] == _OWN:
        return dataclasses.replace(preset(record["preset"]), **values)
    return ViTConfig(**values) if record["architecture"] == "vit" else ConvNeXtConfig(**values)


def check_file(path: Path, config: Config) -> None:
    """Compare the names and shapes in a file of weights with a config; no weight is read. Raises ValueError."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        _check_shapes({name: tuple(file.get_slice(name).get_shape()) for name in names}, config)


def _check_state(state: Mapping[str, Tensor], config: Config) -> None:
    _check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, config)


def _check_shapes(got: Mapping[str, tuple[int, ...]], config: Config) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in from_config(config).state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if wrong:
        listed = ", ".join(f"{name} is {got.get(name)}, not {wanted.get(name)}" for name in wrong[:3])
        raise ValueError(f"{len(wrong)} weights do not fit the model: {listed}")


def settle(partial: Path, final: Path) -> None:
    """Gives a written file its name, durably."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(final)
