"""Files of weights in any layout: safetensors, or torch's own format without code in it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..pretrained import CONFIG, WEIGHTS, load_pretrained
from ..towers import Backbone, from_config
from .layouts import from_layout, to_layout
from .transformers_config import known_from_transformers, transformers_config

_TORCH = (".pt", ".pth", ".bin")


def load_any(path: str | Path, layout: str | None = None, **known: Any) -> Backbone:
    """A tower from weights of any layout, on the CPU, in eval mode, in the stored dtype.

    Args:
        path: a folder of ours or of transformers (all its safetensors files together), or a file: safetensors, or
            what `torch.save` wrote, read without running any code. A transformers config.json beside it is used.
        layout: see :func:`from_layout`.
        known: see :func:`from_layout`.

    Raises:
        FileNotFoundError: nothing there, or a folder without safetensors.
        ValueError: not such a file, or as :func:`from_layout`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    beside = (path if path.is_dir() else path.parent) / CONFIG
    record = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    if path.is_dir() and "format" in record:
        return load_pretrained(path)
    if "model_type" in record:
        known = known_from_transformers(record) | known
    config, state = from_layout(_read(path), layout, **known)
    with torch.device("meta"):
        model = from_config(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


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


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path} holds no safetensors file")
        return {name: tensor for file in files for name, tensor in _read(file).items()}
    if path.suffix not in (".safetensors", *_TORCH):
        raise ValueError(f"{path} is no file of weights: .safetensors, {', '.join(_TORCH)}")
    try:
        state = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as weights alone: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no plain dict of tensors")
    return state
