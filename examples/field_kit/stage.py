"""A stage: how sharp each photo of an index is, and how many photos are blurred."""

import json
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field

import orchestrator


class Sharpness(orchestrator.Stage):
    """The standard deviation of each photo's edges, in grey levels: low where a photo is blurred."""

    kind: Literal["sharpness"]
    side: int = Field(128, ge=8, le=4096, description="The longer side of photos as measured, in pixels.")
    blurred_below: float = Field(4, ge=0, le=255, description="The sharpness below which a photo is blurred.")

    version: ClassVar[int] = 1  # raise it when results of unchanged settings change
    needs_ray: ClassVar[bool] = False
    inputs: ClassVar[tuple[orchestrator.Input, ...]] = (orchestrator.Input("index", ("curate",)),)
    outputs: ClassVar[Mapping[str, str]] = {"sharpness.json": "the sharpness of each photo, by name"}

    def run(self, context: orchestrator.Context) -> Mapping[str, float]:
        """Measures every photo; what it returns is the summary line."""
        index = orchestrator.ImageIndex.load(context.inputs["index"].path, context.roots)
        found = {}
        for row in range(len(index)):
            if context.stop.is_set():
                raise orchestrator.Stopped
            with Image.open(index.path(row)) as photo:
                photo.thumbnail((self.side, self.side))
                edges = np.asarray(photo.convert("L").filter(ImageFilter.FIND_EDGES))
            found[f"{index[row].source}/{index[row].path}"] = float(edges.std())
        (context.out / "sharpness.json").write_text(json.dumps(found, indent=1))
        blurred = sum(value < self.blurred_below for value in found.values())
        return {"sharpness": float(np.mean(list(found.values()))), "blurred": float(blurred)}
