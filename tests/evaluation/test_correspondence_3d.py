"""Correspondence in space, beside plain loops in float64, on drawn rooms, a simulated castle and a real stereo pair."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from orchestrator.config.scenes import SceneData
from orchestrator.data.scenes import Seen, View, angle_between, pairs_of, read_cameras, rotation_of
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Features, Figure
from orchestrator.evaluation.metrics.correspondence_3d import Correspondence3d, matches_in_space
from orchestrator.storage.cache_folder import cache_folder

PATCH, HEIGHT, WIDTH, FOCAL = 4, 48, 64, 60.0
CASTLE = "visp-images-data_3.5.0-1_all.deb"


def camera(x: float, turn: float) -> np.ndarray:
    """From the world to a camera at (x, 0, 0) that looks along z and is turned about y by `turn` degrees."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("y", turn, degrees=True).as_matrix()
    pose[:3, 3] = -pose[:3, :3] @ (x, 0, 0)
    return pose


def room(pose: np.ndarray, focal: float = FOCAL) -> tuple[np.ndarray, np.ndarray]:
    """Depth along z and the world's places of each pixel: a wall at z = 3, and before it a ball of radius 0.5."""
    depth, places = np.zeros((HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH, 3))
    rotation, eye = pose[:3, :3], -pose[:3, :3].T @ pose[:3, 3]
    for v in range(HEIGHT):
        for u in range(WIDTH):
            local = np.array([(u + 0.5 - WIDTH / 2) / focal, (v + 0.5 - HEIGHT / 2) / focal, 1.0])
            ray = rotation.T @ local
            far = (3 - eye[2]) / ray[2]
            to_ball = eye - (0.1, 0, 2)
            a, b, c = ray @ ray, 2 * ray @ to_ball, to_ball @ to_ball - 0.25
            under = b * b - 4 * a * c
            near = (-b - math.sqrt(under)) / (2 * a) if under > 0 else math.inf
            depth[v, u] = min(far, near)
            places[v, u] = eye + depth[v, u] * ray
    return depth, places


def intrinsics(focal: float = FOCAL) -> np.ndarray:
    return np.array([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1.0]])


def seen(pose: np.ndarray, depth: np.ndarray) -> Seen:
    pixels = np.zeros((*depth.shape, 3), np.uint8)
    return Seen(pixels, depth, View(Path("a"), Path("b"), intrinsics(), pose))


def naive(
    first: Seen, other: Seen, ours: np.ndarray, theirs: np.ndarray, size: int, tolerance: float
) -> list[float]:
    """Errors by definition, a patch at a time, without matrices of the code under test."""

    def place(view: Seen, row: int, column: int, count: int) -> np.ndarray | None:
        side, middle = min(HEIGHT, WIDTH), np.array([WIDTH - HEIGHT, 0]) / 2
        u, v = (np.array([column + 0.5, row + 0.5]) / count) * side + middle
        z = view.depth_HW[int(v), int(u)]
        if z <= 0:
            return None
        local = np.array([(u - WIDTH / 2) / FOCAL * z, (v - HEIGHT / 2) / FOCAL * z, z, 1.0])
        return (np.linalg.inv(view.view.world_to_camera) @ local)[:3]

    count = ours.shape[0]
    candidates = [
        (theirs[r, c], there)
        for r in range(count)
        for c in range(count)
        if (there := place(other, r, c, count)) is not None
    ]
    errors = []
    for r in range(count):
        for c in range(count):
            own = place(first, r, c, count)
            if own is None:
                continue
            local = other.view.world_to_camera @ [*own, 1.0]
            if local[2] <= 0:
                continue
            u, v = FOCAL * local[0] / local[2] + WIDTH / 2, FOCAL * local[1] / local[2] + HEIGHT / 2
            if not ((WIDTH - HEIGHT) / 2 <= u < (WIDTH + HEIGHT) / 2 and 0 <= v < HEIGHT):
                continue
            there = other.depth_HW[int(v), int(u)]
            if there <= 0 or abs(there - local[2]) > tolerance:
                continue
            a = ours[r, c].astype(np.float64)
            likeness = [float(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for b, _ in candidates]
            errors.append(float(np.linalg.norm(own - candidates[int(np.argmax(likeness))][1])))
    return errors


@pytest.mark.parametrize(("shift", "turn"), [(0.0, 0.0), (0.4, 0.0), (0.5, 12.0), (-0.3, -8.0)])
def test_errors_are_those_of_plain_loops(shift: float, turn: float) -> None:
    poses = camera(0, 0), camera(shift, turn)
    first, other = (seen(pose, room(pose)[0]) for pose in poses)
    other.depth_HW[:6, :30] = 0
    # Middles of patches lie within pixels, not between them, where rounding would decide.
    rng, count = np.random.default_rng(0), 11
    ours, theirs = rng.normal(size=(2, count, count, 8)).astype(np.float32)
    found = matches_in_space(ours, theirs, first, other, count * PATCH, 0.05)
    expected = naive(first, other, ours, theirs, count * PATCH, 0.05)
    assert 20 < len(expected) < count**2
    np.testing.assert_allclose(found.errors_P, expected, rtol=1e-9, atol=1e-12)


def test_what_hides_a_place_takes_it_out() -> None:
    poses = camera(0, 0), camera(0.8, 0)
    first, other = (seen(pose, room(pose)[0]) for pose in poses)
    maps = np.ones((12, 12, 4), np.float32)
    strict = matches_in_space(maps, maps, first, other, 48, 0.05)
    lax = matches_in_space(maps, maps, first, other, 48, 10.0)
    assert len(strict.errors_P) < len(lax.errors_P), "the ball hides a part of the wall"


def features(maps: Callable[[np.ndarray], np.ndarray]) -> Features:
    return Features(
        "model", "student", np.zeros((0, 3), np.float32), [], [], 0, lambda: np.zeros((0, 0, 3)), size=48, maps=maps,
        patch=PATCH,
    )  # fmt: skip


def save(scene: Path, poses: list[np.ndarray], scale: float = 1000) -> None:
    """Pictures whose colours are the places that they show."""
    record = {}
    for at, pose in enumerate(poses):
        depth, places = room(pose)
        for folder in ("images", "depth"):
            (scene / folder).mkdir(parents=True, exist_ok=True)
        colours = (places - (-2, -2, 1)) / (4, 4, 2.2) * 255
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(scene / f"images/{at}.png")
        Image.fromarray((depth * scale).round().astype(np.uint16)).save(scene / f"depth/{at}.png")
        record[f"images/{at}.png"] = {
            "depth": f"depth/{at}.png",
            "intrinsics": [FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2],
            "world_to_camera": pose.tolist(),
        }
    (scene / "cameras.json").write_text(json.dumps(record))


def colours(crops_BSSC: np.ndarray) -> np.ndarray:
    """The colour in the middle of each patch, which in these pictures is the place, far from 0: no two are parallel."""
    middle = crops_BSSC[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].astype(np.float32)
    return np.concatenate([middle, 255 - middle], axis=-1)


def test_features_that_know_places_find_them(tmp_path: Path) -> None:
    save(tmp_path / "room", [camera(0, 0), camera(0.3, 5), camera(-0.3, -5)])
    metric = Correspondence3d.model_validate(
        {"use": "correspondence_3d", "data": {"path": tmp_path}, "threshold": [0.05, 0.2]}
    )
    metric.check()
    known = metric.measure(features(colours))
    blind = metric.measure(features(lambda crops: np.ones((len(crops), 12, 12, 4), np.float32)))
    found = known["recall_at_0.2m"]
    assert isinstance(found, Figure)
    assert found.num == 3
    assert found.low is not None
    assert found.low <= found.value <= found.high
    assert found.value > 0.9
    assert known["recall_at_0.05m"].value <= found.value
    assert blind["recall_at_0.2m"].value < 0.1
    assert metric.picture(tmp_path / "lines.png")
    assert len(metric.files()["data"]) == 7


def test_navi_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Quaternions (w, x, y, z), millimetres, and depth maps of 655,350 by the depth."""
    scene = tmp_path / "duck/multiview-00-pixel_5"
    save(scene, [camera(0, 0), camera(0.2, 9)])
    record, own = [], json.loads((scene / "cameras.json").read_text())
    for at, pose in enumerate((camera(0, 0), camera(0.2, 9))):
        depth = np.asarray(Image.open(scene / f"depth/{at}.png")).astype(np.float64)
        Image.fromarray((655_350 / depth).round().astype(np.uint16)).save(scene / f"depth/{at}.png")
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat()
        camera_of = {"q": [w, x, y, z], "t": (pose[:3, 3] * 1000).tolist(), "focal_length": FOCAL}
        record.append({"filename": f"{at}.png", "image_size": [HEIGHT, WIDTH], "camera": camera_of})
    (scene / "annotations.json").write_text(json.dumps(record))
    data = SceneData(path=tmp_path, layout="navi")
    ((first, other),) = pairs_of(data)
    np.testing.assert_allclose(other.world_to_camera, own["images/1.png"]["world_to_camera"], atol=1e-12)
    np.testing.assert_array_equal(first.intrinsics, intrinsics())
    metric = Correspondence3d(use="correspondence_3d", data=data, threshold=(0.2,))
    metric.check()
    assert metric.measure(features(colours))["recall_at_0.2m"].value > 0.9


def test_a_rotation_of_a_quaternion_is_scipys() -> None:
    for quaternion in np.random.default_rng(0).normal(size=(5, 4)):
        w, x, y, z = quaternion
        np.testing.assert_allclose(
            rotation_of(quaternion), Rotation.from_quat([x, y, z, w]).as_matrix(), atol=1e-12
        )
    assert angle_between(camera(0, 10), camera(0, -25)) == pytest.approx(35)


def spoil(record: dict[str, Any], part: str, value: Any) -> None:
    record["images/0.png"][part] = value


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda record: spoil(record, "intrinsics", [1, 2]), "the intrinsics of images/0.png is not 4 numbers"),
        (lambda record: spoil(record, "intrinsics", [0, 1, 2, 3]), "the focal length of images/0.png is 0, 1"),
        (lambda record: spoil(record, "world_to_camera", (2 * np.eye(4)).tolist()), "is not a rotation"),
        (lambda record: spoil(record, "depth", "depth/9.png"), "there is no file depth/9.png"),
        (lambda record: record["images/0.png"].pop("depth"), "images/0.png lacks depth"),
        (lambda record: record.clear(), "names no picture"),
    ],
)  # fmt: skip
def test_mistakes_in_cameras_are_named(tmp_path: Path, change: Callable[[Any], Any], what: str) -> None:
    save(tmp_path / "room", [camera(0, 0), camera(0.2, 0)])
    path = tmp_path / "room/cameras.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=what) as caught:
        read_cameras(path, SceneData(path=tmp_path))
    assert caught.value.where == str(path)


def test_mistakes_in_scenes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no cameras\.json"):
        SceneData(path=tmp_path).scenes()
    save(tmp_path / "room", [camera(0, 0), camera(0.2, 90)])
    with pytest.raises(UserError, match="two views within 20 degrees"):
        pairs_of(SceneData(path=tmp_path, max_angle=20))
    with pytest.raises(UserError, match="the median depth"):
        Correspondence3d(use="correspondence_3d", data=SceneData(path=tmp_path, scale=1)).check()
    Image.fromarray(np.ones((9, 9), np.uint16)).save(tmp_path / "room/depth/0.png")
    with pytest.raises(UserError, match=r"0\.png has 9x9 pixels, and its picture 64x48"):
        Correspondence3d(use="correspondence_3d", data=SceneData(path=tmp_path)).check()


def test_one_place_is_one_place_in_a_real_stereo_pair() -> None:
    """Middlebury's motorcycle: what the left view shows at x, the right one shows at x - disparity."""
    data = pytest.importorskip("skimage.data")
    left, right, disparity = data.stereo_motorcycle()
    disparity = disparity.astype(np.float64)
    # Of the set, for pictures of this size: focal length, baseline in metres, and both principal points.
    focal, baseline, cx, cy, between = 994.978, 0.193001, 311.193, 254.877, 31.086
    known = np.isfinite(disparity) & (disparity > 0)
    depth = np.where(known, baseline * focal / (np.where(known, disparity, 0) + between), 0)
    pose = np.eye(4)
    pose[0, 3] = -baseline
    matrix, shifted = (np.array([[focal, 0, x], [0, focal, cy], [0, 0, 1]]) for x in (cx, cx + between))
    first = Seen(left, depth, View(Path("l"), Path("l"), matrix, np.eye(4)))
    other = Seen(right, np.ones(right.shape[:2]), View(Path("r"), Path("r"), shifted, pose))
    y, x = (one[::997] for one in np.nonzero(known))
    xy = np.column_stack([x + 0.5, y + 0.5])
    points, there = first.points(xy)
    assert there.all()
    found, z = other.project(points)
    np.testing.assert_allclose(found, np.column_stack([xy[:, 0] - disparity[y, x], xy[:, 1]]), atol=1e-6)
    np.testing.assert_allclose(z, depth[y, x])


@pytest.mark.slow
def test_a_castle_of_forty_views_fits_together(tmp_path: Path) -> None:
    """ViSP's simulated depth camera: a place that two views show has the depth that each of them says."""
    from orchestrator.data.samples import unpack_debian

    archive = cache_folder() / CASTLE
    if not archive.is_file():
        pytest.skip("visp-images-data is not in the cache")
    unpack_debian(archive, tmp_path / "package")
    (root,) = (tmp_path / "package").rglob("Castle-simu")
    views = []
    for number in (2, 7, 12):
        raw = (root / f"Depth/Depth_{number:04}.bin").read_bytes()
        depth = np.frombuffer(raw, "<u2", offset=8).reshape(480, 640) * 0.000030518
        # The first pose was written before the first frame.
        pose_file = root / f"CameraPose/Camera_{number - 1:03}.txt"
        matrix = np.array([[700, 0, 320.5], [0, 700, 240.5], [0, 0, 1.0]])
        pixels = np.asarray(Image.open(root / f"Images/Image_{number:04}.pgm").convert("RGB"))
        views.append(Seen(pixels, depth, View(archive, archive, matrix, np.loadtxt(pose_file))))
    first = views[0]
    y, x = (one[::301] for one in np.nonzero(first.depth_HW > 0))
    points, _ = first.points(np.column_stack([x + 0.5, y + 0.5]))
    for other in views[1:]:
        places, z = other.project(points)
        there = other.depth_at(places)
        both = there > 0
        assert both.mean() > 0.5
        # Edges and what is hidden differ; the rest agrees within a hundredth, unless the camera is said to stand still.
        assert np.median(np.abs(there[both] - z[both]) / z[both]) < 0.01
        still = replace(other, view=replace(other.view, world_to_camera=first.view.world_to_camera))
        places, z = still.project(points)
        there = still.depth_at(places)
        assert np.median(np.abs(there[there > 0] - z[there > 0]) / z[there > 0]) > 0.01
