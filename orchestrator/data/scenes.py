"""Views of scenes with depth and cameras: read, checked, paired, and as points in space. NumPy only.

Cameras are OpenCV's: x to the right, y down, z forward. Pixels are counted from the corner of the picture, so that the
middle of the first pixel is (0.5, 0.5). Lengths are metres, all numbers float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.scenes import DepthCode, SceneData
from orchestrator.data.decode import UnreadableImage, read_rgb, upright_size
from orchestrator.data.dense import png_numbers, png_size
from orchestrator.errors import UserError, shortened
from orchestrator.fsio import open_regular

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

_MOST_OF_JSON = 1 << 28
# Of a pixel.
_ROUNDING = 1e-6
_SHAPE = (
    "`cameras.json` maps each picture to its depth, intrinsics [fx, fy, cx, cy] and world_to_camera (4 x 4)"
)


@dataclass(frozen=True)
class View:
    """A picture, its depth map and its camera.

    Attributes:
        image, depth: the files.
        intrinsics: (3, 3), from places in front of the camera to pixels.
        world_to_camera: (4, 4), a rotation and a translation in metres.
    """

    image: Path
    depth: Path
    intrinsics: Floats
    world_to_camera: Floats


@dataclass(frozen=True)
class Seen:
    """A view that was read.

    Attributes:
        image_HWC: its pixels.
        depth_HW: metres along the axis of the camera, 0 where it is not known.
        view: its camera.
    """

    image_HWC: Pixels
    depth_HW: Floats
    view: View

    def points(self, xy_P2: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """The places in space of pixels, (P, 3) in the world, and which of them have depth."""
        z_P = self.depth_at(xy_P2)
        rays_P3 = np.column_stack([xy_P2, np.ones(len(xy_P2))]) @ np.linalg.inv(self.view.intrinsics).T
        rotation, shift = self.view.world_to_camera[:3, :3], self.view.world_to_camera[:3, 3]
        # A rotation's inverse is its transpose.
        return (rays_P3 * z_P[:, None] - shift) @ rotation, z_P > 0

    def project(self, points_P3: Floats) -> tuple[Floats, Floats]:
        """The pixels of places in the world, (P, 2), nan behind the camera; and their depth along its axis, (P,)."""
        rotation, shift = self.view.world_to_camera[:3, :3], self.view.world_to_camera[:3, 3]
        local_P3 = points_P3 @ rotation.T + shift
        homogeneous_P3 = local_P3 @ self.view.intrinsics.T
        z_P = local_P3[:, 2]
        there_P = z_P > 0
        xy_P2 = np.full((len(points_P3), 2), np.nan)
        xy_P2[there_P] = homogeneous_P3[there_P, :2] / homogeneous_P3[there_P, 2:]
        return xy_P2, z_P

    def depth_at(self, xy_P2: Floats) -> Floats:
        """The depth of the pixel that each place is in, (P,); 0 outside of the picture."""
        height, width = self.depth_HW.shape
        inside_P = np.asarray(np.isfinite(xy_P2).all(axis=1), dtype=np.bool_)
        inside_P[inside_P] = ((xy_P2[inside_P] >= 0) & (xy_P2[inside_P] < (width, height))).all(axis=1)
        found = np.zeros(len(xy_P2))
        # A place between two pixels is in the second one, whatever the rounding of its numbers.
        x, y = np.minimum((xy_P2[inside_P] + _ROUNDING).astype(np.int64), (width - 1, height - 1)).T
        found[inside_P] = self.depth_HW[y, x]
        return found


def pairs_of(data: SceneData) -> list[tuple[View, View]]:
    """The pairs of views of all scenes, in the order of their names.

    Raises:
        UserError: a file of cameras cannot be read or lacks a part, or no scene has two views that fit.
    """
    found: list[tuple[View, View]] = []
    for cameras in data.scenes():
        views = read_cameras(cameras, data)
        pairs = [
            (one, other)
            for at, one in enumerate(views)
            for other in views[at + 1 :]
            if angle_between(one.world_to_camera, other.world_to_camera) <= data.max_angle
        ]
        count = min(data.pairs_per_scene, len(pairs))
        found += [pairs[at * len(pairs) // count] for at in range(count)]
    if not found:
        raise UserError(
            f"no scene of {data.path} has two views within {data.max_angle:g} degrees",
            where=str(data.path),
            hint="raise `max_angle`, or give scenes more views",
        )
    return found


def angle_between(one: Floats, other: Floats) -> float:
    """The angle of the rotation from one camera to another, in degrees."""
    cosine = (np.trace(one[:3, :3] @ other[:3, :3].T) - 1) / 2
    return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))


def read_cameras(path: Path, data: SceneData) -> list[View]:
    """The views of one scene by the names of their pictures.

    Raises:
        UserError: the file cannot be read, a part is missing, or a pose is not a rotation.
    """
    try:
        with open_regular(path) as file:
            record = json.loads(file.read(_MOST_OF_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"the cameras cannot be read: {error}", where=str(path), hint="copy it again"
        ) from error
    views = _navi(record, path) if data.layout == "navi" else _own(record, path)
    for view in views:
        for part in (view.image, view.depth):
            if not part.is_file():
                raise UserError(
                    f"there is no file {part.relative_to(path.parent)}, which {path.name} names",
                    where=str(path),
                    hint="copy the scene again",
                )
    return views


def check_view(view: View, code: DepthCode) -> None:
    """Compare the size of a view's picture and depth map.

    Raises:
        UserError: they differ, or one of them cannot be read.
    """
    try:
        size = upright_size(view.image)
    except UnreadableImage as error:
        raise UserError(
            f"a picture cannot be read: {error.reason}", where=str(view.image), hint="copy it again"
        ) from error
    of_depth = png_size(view.depth, is_depth=True)
    if size != of_depth:
        raise UserError(
            f"{view.depth.name} has {of_depth[0]}x{of_depth[1]} pixels, and its picture {size[0]}x{size[1]}",
            where=str(view.depth),
            hint="a depth map has the size of its picture; scale it by the nearest pixel, and the intrinsics with it",
        )
    seen = metres(view.depth, code)
    there = seen[seen > 0]
    if len(there) and not 0.01 <= float(np.median(there)) <= 500:
        raise UserError(
            f"the median depth of {view.depth.name} is {np.median(there):.3g} m",
            where=str(view.depth),
            hint="set `scale` to the number that is one metre",
        )


def read_view(view: View, code: DepthCode) -> Seen:
    """A view's picture and depth.

    Raises:
        UserError: as :func:`check_view`.
    """
    try:
        image_HWC = read_rgb(view.image)
    except UnreadableImage as error:
        raise UserError(
            f"a picture cannot be read: {error.reason}", where=str(view.image), hint="copy it again"
        ) from error
    depth_HW = metres(view.depth, code)
    if depth_HW.shape != image_HWC.shape[:2]:
        check_view(view, code)
    return Seen(image_HWC, depth_HW, view)


def metres(path: Path, code: DepthCode) -> Floats:
    """A depth map in metres, 0 where it has no depth; raises UserError if it cannot be read."""
    values = png_numbers(path, is_depth=True).astype(np.float64)
    if code.inverse is None:
        return values / code.scale
    depth: Floats = np.zeros_like(values)
    np.divide(code.inverse / code.scale, values, out=depth, where=values > 0)
    return depth


def _own(record: Any, path: Path) -> list[View]:
    if not isinstance(record, Mapping) or not record:
        raise UserError("the file names no picture", where=str(path), hint=_SHAPE)
    views = []
    for name in sorted(record):
        entry = record[name]
        lacking = [part for part in ("depth", "intrinsics", "world_to_camera") if part not in _keys(entry)]
        if lacking:
            raise UserError(f"{name!s:.80} lacks {', '.join(lacking)}", where=str(path), hint=_SHAPE)
        fx, fy, cx, cy = _numbers(entry["intrinsics"], (4,), f"the intrinsics of {name}", path).tolist()
        pose = _numbers(entry["world_to_camera"], (4, 4), f"the pose of {name}", path)
        _check_rotation(pose, name, path)
        views.append(_view(path, str(name), str(entry["depth"]), (fx, fy, cx, cy), pose))
    return views


def _navi(record: Any, path: Path) -> list[View]:
    """NAVI's annotations: quaternions (w, x, y, z) and millimetres, from the object to the camera."""
    hint = "NAVI's annotations.json is a list with filename, image_size and camera (q, t, focal_length)"
    if not isinstance(record, list) or not record:
        raise UserError("the file names no picture", where=str(path), hint=hint)
    views = []
    for entry in record:
        camera: Any = entry.get("camera") if isinstance(entry, Mapping) else None
        if not {"filename", "image_size"} <= _keys(entry) or not {"q", "t", "focal_length"} <= _keys(camera):
            raise UserError(
                f"an entry lacks a part: {shortened(str(entry), 100)}", where=str(path), hint=hint
            )
        name = str(entry["filename"])
        height, width = _numbers(entry["image_size"], (2,), f"the size of {name}", path).tolist()
        focal = float(_numbers([camera["focal_length"]], (1,), f"the focal length of {name}", path)[0])
        pose = np.eye(4)
        pose[:3, :3] = rotation_of(_numbers(camera["q"], (4,), f"the rotation of {name}", path))
        pose[:3, 3] = _numbers(camera["t"], (3,), f"the translation of {name}", path) / 1000
        _check_rotation(pose, name, path)
        depth = str(Path("depth", name).with_suffix(".png"))
        middle = (float(width // 2), float(height // 2))
        views.append(_view(path, f"images/{name}", depth, (focal, focal, *middle), pose))
    return sorted(views, key=lambda view: view.image.name)


def rotation_of(quaternion_4: Floats) -> Floats:
    """The rotation (3, 3) of a quaternion (w, x, y, z), which need not have length 1; nan of none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        w, x, y, z = quaternion_4 / np.linalg.norm(quaternion_4)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _view(path: Path, image: str, depth: str, intrinsics: tuple[float, ...], pose: Floats) -> View:
    fx, fy, cx, cy = intrinsics
    if not (fx > 0 and fy > 0):
        raise UserError(
            f"the focal length of {image} is {fx:g}, {fy:g}",
            where=str(path),
            hint="focal lengths are pixels, above 0",
        )
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    return View(path.parent / image, path.parent / depth, matrix, pose)


def _keys(entry: Any) -> set[str]:
    return set(entry) if isinstance(entry, Mapping) else set()


def _numbers(values: Any, shape: tuple[int, ...], what: str, path: Path) -> Floats:
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != shape or not np.isfinite(found).all():
        wanted = " x ".join(map(str, shape))
        raise UserError(
            f"{what} is not {wanted} numbers: {shortened(str(values), 80)}", where=str(path), hint=_SHAPE
        )
    return found


def _check_rotation(pose: Floats, name: str, path: Path) -> None:
    rotation = pose[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise UserError(
            f"the pose of {name!s:.80} is not a rotation with a translation",
            where=str(path),
            hint="world_to_camera has a rotation of determinant 1 in its first three columns, and lengths in metres",
        )
