"""Whether an exported folder gives what the tower gives: loaded by its library, in a fresh process, at three sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..towers import Backbone

LIMIT = 1e-4
"""The largest absolute difference of outputs that are taken for the same model's. They are normed: up to ten or so."""


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of an output, over a batch of images of one size in pixels.

    NaN if an output is not finite.
    """

    batch: int
    height: int
    width: int
    value: float

    @property
    def is_small(self) -> bool:
        """Whether it is at most LIMIT; NaN is not."""
        return self.value <= LIMIT

    def __str__(self) -> str:
        return f"{self.value:.1e} at {self.batch} × {self.height} × {self.width}"


class ReloadError(ValueError):
    """The library cannot be imported (`step` is "import"), or cannot "load" or "run" what was written for it."""

    def __init__(self, step: str, error: str) -> None:
        super().__init__(error)
        self.step = step


def sizes(patch: int, size: int) -> tuple[tuple[int, int, int], ...]:
    """The (batch, height, width) that are compared: the trained size, a wide and a larger tall one.

    Args:
        patch: pixels a side of a patch, which divides all of them.
        size: pixels a side that the tower was trained for.
    """
    cells = max(2, round(size / patch))
    grids = ((2, cells, cells), (1, max(2, cells // 2), cells + 1), (3, cells + cells // 2, cells))
    return tuple((batch, rows * patch, columns * patch) for batch, rows, columns in grids)


def compare(model: Backbone, folder: Path, size: int) -> list[Difference]:
    """Differences between a tower and what its library loads from a folder, one for each of :func:`sizes`.

    The images are the same each time: noise of mean 0 and deviation 1, as normalised pixels have.

    Args:
        model: in eval mode, on the CPU, in fp32.
        folder: that :func:`write` filled.
        size: pixels a side that the tower was trained for.

    Raises:
        ReloadError: the library cannot import, load or run it.
    """
    generator = torch.Generator().manual_seed(0)
    images = {
        str(number): torch.randn(batch, model.config.num_channels, height, width, generator=generator)
        for number, (batch, height, width) in enumerate(sizes(model.patch_size, size))
    }
    found = _reloaded(folder, images)
    return [_difference(model, images[name], found, name) for name in sorted(images)]


@torch.inference_mode()
def _difference(model: Backbone, images_BCHW: Tensor, found: dict[str, Tensor], name: str) -> Difference:
    features, worst = model(images_BCHW), []
    for kind, expected in (("cls", features.cls), ("patches", features.patches)):
        got = found[f"{kind}.{name}"]
        if got.shape != expected.shape:
            raise ReloadError("run", f"{kind} is {tuple(got.shape)}, not {tuple(expected.shape)}")
        worst.append((got - expected).abs().max())
    batch, _, height, width = images_BCHW.shape
    return Difference(batch, height, width, torch.stack(worst).max().item())  # NaN if one of them is


def _reloaded(folder: Path, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model in the folder gives, in a process that has imported nothing yet."""
    with tempfile.TemporaryDirectory() as exchange:
        save_file(images, Path(exchange, "images.safetensors"))
        ended = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).with_name("reload.py")), str(folder), exchange],
            # Nothing is fetched: all that it takes is in the folder.
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        told = Path(exchange, "error.json")
        if told.exists():
            record = json.loads(told.read_text())
            raise ReloadError(record["step"], record["error"])
        if ended.returncode != 0:
            last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ReloadError("run", f"its process ended with {ended.returncode}: {last}")
        found: dict[str, Tensor] = load_file(Path(exchange, "found.safetensors"))
        return found
