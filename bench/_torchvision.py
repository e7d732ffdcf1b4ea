"""A torchvision that was built for another torch, made importable: timm and transformers need no more of it.

PyPI's torchvision beside a torch for CPUs is one. This file imports nothing of the project, so that other processes can
run it too.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_KEPT: list[Any] = []  # a library's operators go with it


def mend_torchvision() -> None:
    """Defines the operators that torchvision's own library would, if it cannot be loaded."""
    if find_spec("torchvision") is None:
        return
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        _KEPT.append(library)
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def for_other_processes(folder: Path) -> str:
    """A PYTHONPATH, this process's with a folder before it: processes that get it begin with :func:`mend_torchvision`.

    Args:
        folder: is written to.
    """
    code = f"import runpy\n_kept = runpy.run_path({str(Path(__file__).resolve())!r})\n_kept['mend_torchvision']()\n"
    (folder / "sitecustomize.py").write_text(code)
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
