"""Towers as graphs of operators, for ONNX runtimes and torch.export: no code of the tower is needed to run them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..towers import Backbone
from .formats import PREPROCESSING, Preprocessing

ONNX = "model.onnx"
PT2 = "model.pt2"
INPUT = "images"
OUTPUTS = ("cls", "patches")
# Protocol buffers end at 2 GiB; the graph itself needs some of that.
_LARGEST_ONNX = 2**31 - 2**26


class _Graph(nn.Module):
    """A tower whose outputs are plain tensors."""

    def __init__(self, tower: Backbone) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.tower(images)
        return features.cls, features.patches


def write_torch_export(model: Backbone, preprocessing: Preprocessing, folder: Path) -> None:
    """`model.pt2`, for `torch.export.load`; batch, height and width are dynamic."""
    torch.export.save(_exported(model), folder / PT2)
    _write_preprocessing(preprocessing, folder)


def write_onnx(model: Backbone, preprocessing: Preprocessing, folder: Path) -> None:
    """`model.onnx`: input `images`, outputs `cls` and `patches`; batch, height and width are dynamic.

    Weights are in the file unless it would exceed what protocol buffers can hold.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with _quiet():
        torch.onnx.export(
            _exported(model),
            f=folder / ONNX,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            # The names of the axes.
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
            external_data=size > _LARGEST_ONNX,
            dynamo=True,
            verbose=False,
        )
    _write_preprocessing(preprocessing, folder)


def _exported(model: Backbone) -> torch.export.ExportedProgram:
    """The forward as a graph, for any batch and all sizes of at least two patches a side.

    One patch a side would be another graph: torch.export sees that a dimension of 1 broadcasts.
    """
    patch = model.patch_size
    # No dimension that may change is 0 or 1, or equal to another such one: torch.export would take that for a property
    # of all inputs.
    example = torch.zeros(2, model.config.num_channels, 3 * patch, 4 * patch)
    shape = {
        0: torch.export.Dim("batch"),
        2: patch * torch.export.Dim("rows", min=2),
        3: patch * torch.export.Dim("columns", min=2),
    }
    with torch.no_grad(), _quiet():
        program = torch.export.export(_Graph(model).eval(), (example,), dynamic_shapes=(shape,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has paths of this machine
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print, log and warn of themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _write_preprocessing(preprocessing: Preprocessing, folder: Path) -> None:
    text = json.dumps(preprocessing.record(), indent=2) + "\n"
    (folder / PREPROCESSING).write_text(text, encoding="utf-8")
