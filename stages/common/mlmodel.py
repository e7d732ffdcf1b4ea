"""MLflow's description of a trained model: which module loads it, what it takes and what it gives. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

LOADER = "orchestrator.stages.serving"
# Over HTTP binary comes base64-coded.
_IMAGE = {"type": "binary", "name": "image", "required": True}


def mlmodel(folder: Path, python: str | None = None) -> str:
    """The text of `MLmodel` for a folder that `save_pretrained` or `save_aligned` wrote; the same for the same model.

    `python` is the version that made the model, such as 3.11. Without it MLflow warns that it does not know, and loads
    the model all the same.

    MLflow's python_function flavour: one column `image` with the bytes of a JPEG, PNG or WebP file a row → float32
    (rows, D), unit length.
    """
    return yaml.safe_dump(
        {
            # No versions of what runs now: they would make another model of the same weights. They are tags of the run.
            "flavors": {
                "python_function": {
                    "loader_module": LOADER,
                    **({"python_version": python} if python is not None else {}),
                }
            },
            "signature": {
                "inputs": json.dumps([_IMAGE]),
                "outputs": json.dumps([_output(folder)]),
                "params": None,
            },
        },
        sort_keys=True,
    )


def _output(folder: Path) -> dict[str, Any]:
    return {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, width(folder)]}}


def width(folder: Path) -> int:
    """The number of values of an embedding."""
    config = json.loads((folder / "config.json").read_text())
    if "output_dim" in config:
        return int(config["output_dim"])
    fields = config["config"]
    # A package's model says `preset` for its architecture; its shape has the fields of ours.
    return int(fields["dims"][-1] if "dims" in fields else fields["dim"])
