"""Files of weights in any layout: safetensors, or torch's own format without code in it."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..configs import Config
from ..pretrained import CONFIG, WEIGHTS, check_file, load_pretrained, read_config
from ..towers import Backbone, from_config
from .layouts import from_layout, to_layout
from .training_checkpoint import backbone_of
from .transformers_config import known_from_transformers, transformers_config

_TORCH = (".pt", ".pth", ".bin")
_SMALL = 2**16


class DamagedWeightsError(ValueError):
    """A file of weights that is not whole, or not what it was when it was written."""


def load_any(path: str | Path, layout: str | None = None, **known: Any) -> Backbone:
    """A tower from weights of any layout, on the CPU, in eval mode, in the stored dtype.

    Args:
        path: a folder of ours or of transformers (all its safetensors files together), or a file: safetensors, or
            what `torch.save` wrote, read without running any code. A transformers config.json beside it is used. Of a
            training checkpoint the backbone is taken, see :func:`training_checkpoint.backbone_of`.
        layout: see :func:`from_layout`.
        known: see :func:`from_layout`.

    Raises:
        FileNotFoundError: nothing there, or a folder without safetensors.
        ValueError: not such a file, or as :func:`from_layout`.
    """
    path = Path(path)
    record = _record(path)
    if path.is_dir() and "format" in record:
        return load_pretrained(path)
    config, state = from_layout(backbone_of(_read(path)), layout, **_known(record) | known)
    with torch.device("meta"):
        model = from_config(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def config_of(path: str | Path, **known: Any) -> Config:
    """The config of the tower that :func:`load_any` would load, with hardly any of its weights read; raises as it."""
    path = Path(path)
    record = _record(path)
    if path.is_dir() and "format" in record:
        config = read_config(record)
        try:
            check_file(path / WEIGHTS, config)
        except SafetensorError as error:
            raise DamagedWeightsError(f"{path / WEIGHTS} is damaged: {error}") from error
        except OSError as error:
            raise ValueError(f"{path / WEIGHTS} cannot be read: {error}") from error
        return config
    # Small tensors may be looked into; of large ones only the shapes count.
    state = {
        name: tensor if tensor.numel() <= _SMALL else tensor.to("meta")
        for name, tensor in backbone_of(_read(path)).items()
    }
    return from_layout(state, **_known(record) | known)[0]


def _record(path: Path) -> dict[str, Any]:
    """The config.json of a folder, or beside a file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    beside = (path if path.is_dir() else path.parent) / CONFIG
    record: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return record


def _known(record: Mapping[str, Any]) -> dict[str, Any]:
    return known_from_transformers(record) if "model_type" in record else {}


def save_as(model: Backbone, folder: str | Path, layout: str) -> None:
    """Writes a tower as model.safetensors in a layout; for transformers with the config.json that it loads.

    Args:
        folder: made if missing.

    Raises:
        ValueError: as :func:`to_layout` and :func:`transformers_config`.
    """
    state = to_layout(model.state_dict(), model.config, layout)
    record = transformers_config(model.config) if layout == "transformers" else None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    if record is not None:
        (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, or of all safetensors files of a folder; runs no code that may be in it.

    Raises:
        FileNotFoundError: a folder without safetensors.
        DamagedWeightsError: such a file that is damaged.
        ValueError: not such a file, or one that only unpickling code could read.
    """
    state = _read(path)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} does not contain a plain dict of tensors")
    return state


def _read(path: Path) -> dict[str, Any]:
    """What a file or folder holds: tensors by name, or in a file of torch's other things of which none is code."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path} contains no safetensors file")
        return {name: tensor for file in files for name, tensor in _read(file).items()}
    if path.suffix not in (".safetensors", *_TORCH):
        raise ValueError(f"{path} is not a file of weights: .safetensors, {', '.join(_TORCH)}")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, "cpu", weights_only=True, mmap=is_zipfile(path))
        )
    except pickle.UnpicklingError as error:
        # torch's own message says how to run what is in the file.
        raise ValueError(
            f"{path} cannot be read as weights alone: it is damaged, or reading it would run code that is in it"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        # Torch's own files are zip archives; what else it cannot read of one is code.
        if not isinstance(error, RuntimeError) or "zip archive" in said:
            raise DamagedWeightsError(f"{path} is damaged: {said}") from error
        raise ValueError(f"{path} cannot be read as weights alone: {said}") from error
    except OSError as error:
        # Of a file whose end is missing, torch looks for parts before its beginning.
        if error.errno != errno.EINVAL:
            raise
        raise DamagedWeightsError(f"{path} is damaged: it is not whole") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} does not contain a plain dict of tensors")
    return state
