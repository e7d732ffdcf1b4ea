"""The formats: what loads each, what it takes to write it, and which towers it cannot express. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..configs import RGB, Config, ConvNeXtConfig, ViTConfig

if TYPE_CHECKING:
    from ..towers import Backbone

LOADER = "load.py"
"""The file of an exported folder that loads it without this package; users copy from it."""
PREPROCESSING = "preprocessing.json"
BANDS_LOADER = "preprocess_bands.py"
"""The file of an exported folder that makes what the model takes from a file's bands; `load.py` does it for photos."""


@dataclass(frozen=True)
class Format:
    """A format that towers are written in.

    Attributes:
        library: what loads it.
        packages: import names of what writing and loading it needs besides torch.
        extra: of this package, that brings them; None where torch alone is needed.
        loader: the file in this folder that loads it.
        note: what its users should know, in a sentence or two.
    """

    library: str
    packages: tuple[str, ...]
    extra: str | None
    loader: str
    note: str


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "timm": Format(
            "timm",
            ("timm",),
            "timm",
            "load_timm.py",
            "`config.json` names timm's architecture and its arguments, so the folder can also be given to what takes "
            "`local-dir:` models. `num_classes=N` in `timm.create_model` adds a fresh classifier.",
        ),
        "transformers": Format(
            "transformers",
            ("transformers",),
            "transformers",
            "load_transformers.py",
            "`pooler_output` is CLS, too. The image processor crops as this project does: shorter side to the size, "
            "bicubic, then the centre.",
        ),
        "onnx": Format(
            "ONNX Runtime",
            ("onnx", "onnxscript", "onnxruntime"),
            "onnx",
            "load_onnx.py",
            "One input, `images`, and two outputs, `cls` and `patches`. Batch, height and width are dynamic. Models "
            "above 2 GB have their weights beside the graph, in `model.onnx.data`.",
        ),
        "torch-export": Format(
            "torch.export",
            (),
            None,
            "load_torch_export.py",
            "The file is a graph of ATen operators with its weights, for torch.export, AOTInductor and ExecuTorch. "
            "`torch.export.load` can run code that is in a file: load files that you made, or that you trust.",
        ),
    }
)


@dataclass(frozen=True)
class Preprocessing:
    """From photos to what a tower takes.

    Attributes:
        size: pixels a side that it was trained for.
        mean: of each channel, of pixels in 0 to 1.
        std: likewise.
        pixels: what config.json says of the files' `bands` and `range`; None for 8-bit RGB.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: Mapping[str, Any] | None = None

    @property
    def is_rgb(self) -> bool:
        """Whether the model takes what photos have."""
        return len(self.mean) == RGB

    def extra(self) -> dict[str, Any]:
        """What a format's config has beside its own fields: how the values of files are seen."""
        return {} if self.pixels is None else {"pixels": dict(self.pixels)}

    def record(self) -> dict[str, Any]:
        """The content of `preprocessing.json`."""
        return {"size": self.size, "mean": self.mean, "std": self.std, **self.extra()}


def misfit(config: Config, name: str) -> str | None:
    """Why the format cannot express a tower of this config; None if it can."""
    # The converters import torch.
    from ..convert.timm_config import timm_config
    from ..convert.transformers_config import transformers_config

    if name not in ("timm", "transformers"):
        return None
    if type(config) not in (ViTConfig, ConvNeXtConfig):
        return f"{name} has no such tower: {type(config).__name__} is of a package of its own"
    try:
        (timm_config if name == "timm" else transformers_config)(config)
    except ValueError as error:
        return str(error)
    return None


def fitting(config: Config) -> list[str]:
    """The formats that can express a tower of this config."""
    return [name for name in FORMATS if misfit(config, name) is None]


def missing(name: str) -> list[str]:
    """The packages that the format needs and that are not installed; imports none."""
    return [package for package in FORMATS[name].packages if find_spec(package) is None]


def write(model: Backbone, name: str, preprocessing: Preprocessing, folder: Path) -> None:
    """Writes a tower in a format, in fp32, with the loader that users copy from.

    Args:
        model: in eval mode, on the CPU, in fp32.
        name: of the format.
        preprocessing: goes with the model.
        folder: exists.

    Raises:
        ValueError: the format cannot express the tower (see :func:`misfit`).
        Exception: what torch.export or the ONNX exporter raise of a tower of a user's package.
    """
    why = misfit(model.config, name)
    if why is not None:
        raise ValueError(why)
    if name in ("timm", "transformers"):
        from . import weights

        (weights.write_timm if name == "timm" else weights.write_transformers)(model, preprocessing, folder)
    else:
        from . import graphs

        (graphs.write_onnx if name == "onnx" else graphs.write_torch_export)(model, preprocessing, folder)
    (folder / LOADER).write_text(loader_text(name), encoding="utf-8")
    if not preprocessing.is_rgb:
        (folder / PREPROCESSING).write_text(
            json.dumps(preprocessing.record(), indent=2) + "\n", encoding="utf-8"
        )
        code = Path(__file__).with_name(BANDS_LOADER).read_text(encoding="utf-8")
        (folder / BANDS_LOADER).write_text(code, encoding="utf-8")


def loader_text(name: str) -> str:
    """The code that loads the format."""
    return Path(__file__).with_name(FORMATS[name].loader).read_text(encoding="utf-8")
