"""Run as a program, in a process of its own: loads an exported folder by its `load.py` and keeps what the model gives.

    python -P reload.py FOLDER EXCHANGE

EXCHANGE has `images.safetensors`, a batch for each size. It gets `found.safetensors` with `cls.N` and `patches.N` of
each batch N, or `error.json` with the step that failed: import, load or run. This package is hidden meanwhile: whoever
gets the folder does not have it. Imports numpy and safetensors alone, besides what `load.py` imports.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors.numpy import load_file, save_file


def main(folder: Path, exchange: Path) -> int:
    """Exit code: 0, or 1 with `error.json`."""
    step = "import"
    try:
        sys.modules["orchestrator"] = None  # type: ignore[assignment]  # importing it raises
        loader = _imported(folder / "load.py")
        step = "load"
        model = loader.load(str(folder))
        step = "run"
        found = {}
        for name, images in load_file(exchange / "images.safetensors").items():
            # One that imports torch takes its tensors.
            torch = getattr(loader, "torch", None)
            cls, patches = loader.features(model, images if torch is None else torch.from_numpy(images))
            found[f"cls.{name}"] = np.ascontiguousarray(cls)
            found[f"patches.{name}"] = np.ascontiguousarray(patches)
        save_file(found, exchange / "found.safetensors")
    except Exception as error:  # of any library, broken in any way
        said = {"step": step, "error": _told(error)}
        (exchange / "error.json").write_text(json.dumps(said))
        return 1
    return 0


def _told(error: BaseException) -> str:
    """What an error says, and what the first of those that brought it about says: libraries hide that."""
    first = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    said = f"{type(error).__name__}: {error}"
    return said if first is error else f"{said} ({type(first).__name__}: {first})"


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("load", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
