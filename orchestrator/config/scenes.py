"""Data sets of scenes that were seen from several places: pictures, depth maps, and where the cameras were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from orchestrator.config.schema import LocalPath
from orchestrator.config.settings import Settings
from orchestrator.errors import UserError, nearest

CAMERAS = {"scenes": "cameras.json", "navi": "annotations.json"}
# Of NAVI: 65,535 times 10 by the number in a depth map is the depth in millimetres.
_NAVI_CODE = 655_350.0


class SceneData(Settings):
    """Views of scenes: pictures with depth maps and the poses of their cameras."""

    path: LocalPath = Field(description="The folder of the dataset.")
    layout: Literal["scenes", "navi"] = Field(
        "scenes",
        description="Where the parts are. scenes: folders with a `cameras.json`, which names pictures, depth maps, "
        "intrinsics and poses. navi: NAVI's `OBJECT/SCENE/annotations.json`, `images/` and `depth/`.",
    )
    scale: float = Field(
        1000.0,
        gt=0,
        description="The value of a depth map that is one metre. It is not used with `navi`.",
    )
    max_angle: float = Field(
        120.0, gt=0, le=180, description="The maximum rotation between the two cameras of a pair, in degrees."
    )
    pairs_per_scene: int = Field(
        20, ge=1, description="The maximum number of pairs of each scene, evenly spread over all of them."
    )

    def scenes(self) -> list[Path]:
        """The files of cameras, one for each scene.

        Raises:
            UserError: there are none.
        """
        name = CAMERAS[self.layout]
        found = sorted(self.path.rglob(name))
        if not found:
            there = sorted({path.name for path in self.path.rglob("*.json")})
            close = nearest(name, there)
            raise UserError(
                f"there is no {name} in {self.path} or below it",
                where=str(self.path),
                hint=f"did you mean {close!r}? Name it {name!r}"
                if close
                else "see `layout` for what it needs",
            )
        return found

    def metres(self) -> DepthCode:
        """How the numbers of depth maps are read."""
        return DepthCode(self.scale) if self.layout == "scenes" else DepthCode(1000.0, _NAVI_CODE)

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """What is part of a stage's key: the cameras, and all pictures and depth maps beside them."""
        folders = [path.parent for path in sorted(self.path.rglob(CAMERAS[self.layout]))]
        parts = [
            path
            for folder in folders
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in {".json", ".png", ".jpg", ".jpeg"} and path.is_file()
        ]
        return {"data": tuple(dict.fromkeys(parts))}


@dataclass(frozen=True)
class DepthCode:
    """What a number of a depth map means.

    Attributes:
        scale: units in a metre, of depth, and of the poses with `navi`.
        inverse: None if the number is the depth; else the number is this by the depth.
    """

    scale: float
    inverse: float | None = None
