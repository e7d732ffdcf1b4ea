"""Metrics of patch features on small data sets in known layouts, beside scikit-learn, OpenCV, torch and plain loops."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.metrics import jaccard_score, mean_squared_error

from orchestrator.config.dense import LAYOUTS, DepthData, MaskData, PairData
from orchestrator.data.dense import DensePictures, read_pair
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Features, Figure
from orchestrator.evaluation.metrics.correspondence import Correspondence, crop, matches
from orchestrator.evaluation.metrics.depth import LinearDepth, _Moments, depth_parts
from orchestrator.evaluation.metrics.patch_grid import class_counts, enlarged, mean_where, side_for
from orchestrator.evaluation.metrics.segmentation import LinearSegmentation, iou_parts, mean_iou

PATCH = 4


def colours(crops_BSSC: np.ndarray) -> np.ndarray:
    """The mean colour of each patch: what a model of colours alone would give."""
    count, side = len(crops_BSSC), crops_BSSC.shape[1] // PATCH
    cut = crops_BSSC.reshape(count, side, PATCH, side, PATCH, 3)
    return cut.mean(axis=(2, 4)).astype(np.float32)


def model(maps: Callable[[np.ndarray], np.ndarray] = colours, size: int = 32) -> Features:
    return Features(
        "model", "student", np.zeros((0, 3), np.float32), [], [], 0, lambda: np.zeros((0, 0, 3)), size=size, maps=maps,
        patch=PATCH,
    )  # fmt: skip


def scene(seed: int, height: int = 40, width: int = 52) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture with a red disc and a green box on blue, and its classes 3, 7 and 0; a frame of 255."""
    rng = np.random.default_rng(seed)
    classes = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    top, left = rng.integers(4, height // 2), rng.integers(8, width // 2)
    classes[top : top + 12, left : left + 14] = 7
    classes[(y - rng.integers(10, 30)) ** 2 + (x - rng.integers(14, 38)) ** 2 < 64] = 3
    colour = {0: (40, 50, 190), 3: (200, 40, 40), 7: (50, 180, 60)}
    pixels = np.zeros((height, width, 3))
    for number, of in colour.items():
        pixels[classes == number] = of
    classes[:2] = 255
    return np.clip(pixels + rng.normal(0, 25, pixels.shape), 0, 255).astype(np.uint8), classes


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def masks(root: Path, layout: str = "folders", count: int = 18, shift: int = 0) -> MaskData:
    of = LAYOUTS[layout]
    parts = ("", "") if of.splits is None else of.splits
    for at in range(count):
        pixels, classes = scene(at)
        folder = parts[at % 3 == 2]
        if layout == "cityscapes":
            folder += "/bonn"
        if layout == "ade20k":
            classes = np.where(classes == 255, 0, classes + 1).astype(np.uint8)
        save(root / of.images / folder / f"{at}{of.image_end or '.png'}", pixels)
        save(root / of.targets / folder / f"{at}{of.target_end}", classes + np.uint8(shift))
    return MaskData.model_validate({"path": root, "layout": layout})


# --- patches and pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "grid"), [((12, 12), (3, 3)), ((13, 17), (4, 5)), ((5, 5), (5, 5))])
def test_pixels_are_counted_for_their_patch(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    classes, values = rng.integers(-1, 3, shape), rng.random(shape)
    counts, sums, there = np.zeros((*grid, 3)), np.zeros(grid), np.zeros(grid)
    for y in range(shape[0]):
        for x in range(shape[1]):
            at = y * grid[0] // shape[0], x * grid[1] // shape[1]
            if classes[y, x] >= 0:
                counts[at][classes[y, x]] += 1
                sums[at] += values[y, x]
                there[at] += 1
    assert (class_counts(classes, grid, 3) == counts.reshape(-1, 3)).all()
    ours = mean_where(values, classes >= 0, grid)
    expected = np.divide(sums, there, out=np.full(grid, np.nan), where=there > 0).ravel()
    assert np.allclose(ours, expected, equal_nan=True)


@pytest.mark.parametrize("channels", [1, 3, 600])
def test_maps_grow_as_torch_lets_them(channels: int) -> None:
    small = np.random.default_rng(0).normal(size=(5, 4, channels)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(small).permute(2, 0, 1)[None], (23, 31), mode="bilinear", align_corners=False
    )
    assert np.allclose(enlarged(small, (23, 31)), theirs[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_sides_are_whole_patches() -> None:
    assert [side_for(size, 14) for size in (1, 20, 21, 224)] == [14, 14, 28, 224]


# --- segmentation -----------------------------------------------------------------------------------------------


def test_mean_iou_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(-1, 4, (6, 20, 20)), rng.integers(0, 5, (6, 20, 20))
    parts = np.stack([iou_parts(g, t, 6) for g, t in zip(guess, truth, strict=True)])
    there = truth >= 0
    expected = jaccard_score(truth[there], guess[there], average="macro")
    assert mean_iou(parts.sum(axis=0, keepdims=True))[0] == pytest.approx(expected)


@pytest.mark.parametrize("layout", ["folders", "ade20k", "cityscapes"])
def test_segmentation_of_each_layout(tmp_path: Path, layout: str) -> None:
    metric = LinearSegmentation(use="linear_segmentation", data=masks(tmp_path, layout), decay=(1e-4, 1e-2))
    metric.check()
    found, (name, floor) = metric.measure(model()), metric.floor(model())
    iou = found["mean_iou"]
    assert isinstance(iou, Figure)
    assert iou.value > 0.8
    assert (name, floor["mean_iou"].value < 0.35) == ("largest class", True)
    assert 0.6 < floor["pixel_accuracy"].value < found["pixel_accuracy"].value
    assert iou.low < iou.value < iou.high
    assert iou.split == "test"
    if layout != "folders":
        assert iou.num == 6
    assert len(metric.files()["data"]) == 36
    assert metric.picture(tmp_path / "shown.png")
    assert (tmp_path / "shown.png").read_bytes().startswith(b"\x89PNG")
    assert (
        LinearSegmentation(use="linear_segmentation", data=metric.data, decay=(1e-4, 1e-2)).measure(model())
        == found
    )


def test_noise_does_no_better_than_the_largest_class(tmp_path: Path) -> None:
    def noise(crops: np.ndarray) -> np.ndarray:
        side = crops.shape[1] // PATCH
        return (
            np.random.default_rng(int(crops.sum()))
            .normal(size=(len(crops), side, side, 3))
            .astype(np.float32)
        )

    metric = LinearSegmentation(use="linear_segmentation", data=masks(tmp_path))
    assert metric.measure(model(noise))["mean_iou"].value < metric.floor(model())[1]["mean_iou"].value + 0.05


def test_the_mask_is_read_as_it_is_and_its_square_is_the_pictures(tmp_path: Path) -> None:
    data = masks(tmp_path)
    pictures = DensePictures(data)
    image, target = pictures.read(3)
    pixels, classes = scene(int(Path(pictures.index()[3].path).stem))
    assert (image == pixels).all()
    assert (target == np.where(classes == 255, -1, classes.astype(int))).all()
    ((small, middle),) = pictures.squares([3], 20)
    assert small.shape == (20, 20, 3)
    assert (middle == target[:, 6:46]).all()


def _no_mask(root: Path) -> None:
    (root / "masks" / "5.png").unlink()


def _no_image(root: Path) -> None:
    (root / "images" / "5.png").unlink()


def _small_mask(root: Path) -> None:
    save(root / "masks" / "5.png", np.zeros((20, 26), np.uint8))


def _coloured_mask(root: Path) -> None:
    save(root / "masks" / "5.png", np.zeros((40, 52, 3), np.uint8))


def _no_folder(root: Path) -> None:
    (root / "masks").rename(root / "mask")


def _broken_mask(root: Path) -> None:
    (root / "masks" / "5.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_no_mask, "1 picture has no mask, such as 5.png"),
        (_no_image, "1 mask has no picture, such as 5.png"),
        (_small_mask, "5.png has 26x20 pixels, and its picture 5.png 52x40"),
        (_coloured_mask, "mode RGB, not of one number for each pixel"),
        (_no_folder, "has no folder 'masks'"),
        (_broken_mask, "cannot be read"),
    ],
)
def test_what_is_wrong_with_masks_is_said_before_anything_runs(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    data = masks(tmp_path)
    harm(tmp_path)
    metric = LinearSegmentation(use="linear_segmentation", data=data)
    with pytest.raises(UserError, match=said) as caught:
        metric.check()
    assert caught.value.where
    assert caught.value.hint


def test_one_class_only(tmp_path: Path) -> None:
    data = masks(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        save(path, np.full((40, 52), 9, np.uint8))
    with pytest.raises(UserError, match="training pictures have only the class 9"):
        LinearSegmentation(use="linear_segmentation", data=data).measure(model())


def test_classes_that_training_lacks(tmp_path: Path) -> None:
    data = masks(tmp_path, "ade20k")
    path = next((tmp_path / "annotations" / "validation").iterdir())
    save(path, np.full((40, 52), 99, np.uint8))
    with pytest.raises(UserError, match="masks of test have classes that those of train lack: 99"):
        LinearSegmentation(use="linear_segmentation", data=data).measure(model())


# --- depth ------------------------------------------------------------------------------------------------------


def depth_set(root: Path, scale: float = 1000.0, count: int = 15) -> DepthData:
    """Walls that get darker with their distance, which runs from 1 to 5 m; some pixels are not measured."""
    for at in range(count):
        rng = np.random.default_rng(at)
        slope = np.linspace(*rng.uniform(1, 5, 2), 48)[None] * np.ones((36, 1))
        pixels = np.clip(250 - 45 * slope[..., None] + rng.normal(0, 4, (36, 48, 3)), 0, 255).astype(np.uint8)
        depth = np.where(rng.random(slope.shape) < 0.1, 0, np.round(slope * scale)).astype(np.uint16)
        save(root / "images" / f"{at}.png", pixels)
        save(root / "depth" / f"{at}.png", depth)
    return DepthData.model_validate({"path": root})


def test_ridge_regression_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)) * [1, 2, 3, 1, 1, 0] + 5
    y = x @ rng.normal(size=6) + rng.normal(size=300)
    sums = _Moments.zero(6)
    for part in range(0, 300, 70):
        sums.add(x[part : part + 70], y[part : part + 70])
    std = np.where(x.std(axis=0) > 0, x.std(axis=0), np.inf)
    for decay in (1e-3, 0.1, 10.0):
        theirs = Ridge(alpha=decay * 300).fit((x - x.mean(axis=0)) / std, y)
        assert np.allclose(sums.ridge(decay)(x), theirs.predict((x - x.mean(axis=0)) / std), atol=1e-6)


def test_errors_of_depth_are_their_formulas() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.uniform(0.5, 5, (20, 30)), rng.uniform(0.5, 5, (20, 30))
    truth[:3] = 0
    squared, relative, hits, count = depth_parts(guess, truth)
    t, g = truth[3:].ravel(), guess[3:].ravel()
    assert count == t.size
    assert squared / count == pytest.approx(mean_squared_error(t, g))
    assert relative / count == pytest.approx(np.mean(np.abs(t - g) / t))
    assert hits == sum(max(a / b, b / a) < 1.25 for a, b in zip(t, g, strict=True))


def test_depth_from_brightness(tmp_path: Path) -> None:
    metric = LinearDepth(use="linear_depth", data=depth_set(tmp_path))
    metric.check()
    found, (name, floor) = metric.measure(model()), metric.floor(model())
    assert name == "mean depth"
    assert found["rmse"].value < 0.15 < 0.8 < floor["rmse"].value
    assert found["delta_1"].value > 0.97
    assert found["abs_rel"].value < 0.05 < floor["abs_rel"].value
    assert found["rmse"].split == "test"
    assert metric.picture(tmp_path / "shown.png")
    assert found["rmse"].low <= found["rmse"].value <= found["rmse"].high


@pytest.mark.parametrize(("written", "guess"), [(1.0, None), (1_000_00.0, None), (256.0, 256)])
def test_depth_in_other_units(tmp_path: Path, written: float, guess: int | None) -> None:
    data = depth_set(tmp_path, min(written, 13_000))
    if written == 256:
        data = data.model_copy(update={"scale": 10.0, "max_depth": 5.0})
    with pytest.raises(UserError, match=r"the median depth of \d+.png is ") as caught:
        LinearDepth(use="linear_depth", data=data).check()
    assert "set `scale` to the number that is one metre" in str(caught.value.hint)
    if guess:
        assert f"{guess} would make it 2.83 m" in str(caught.value.hint)


# --- correspondence ---------------------------------------------------------------------------------------------


def planes(root: Path) -> PairData:
    """Two planes and what a camera that moves and turns sees of them; the homographies are OpenCV's."""
    for plane in range(2):
        rng = np.random.default_rng(plane)
        noise = rng.integers(0, 255, (12, 16, 3)).astype(np.uint8)
        view = cv2.resize(noise, (128, 96), interpolation=cv2.INTER_CUBIC)
        folder = root / f"plane-{plane}"
        folder.mkdir(parents=True)
        Image.fromarray(view).save(folder / "1.ppm")
        corners = np.float32([[0, 0], [127, 0], [127, 95], [0, 95]])
        for number in (2, 3):
            moved = corners + rng.uniform(-12, 12, (4, 2)).astype(np.float32)
            matrix = cv2.getPerspectiveTransform(corners, moved)
            Image.fromarray(cv2.warpPerspective(view, matrix, (128, 96))).save(folder / f"{number}.ppm")
            np.savetxt(folder / f"H_1_{number}", matrix)
    return PairData(path=root)


def detailed(crops: np.ndarray) -> np.ndarray:
    """Nine colours of each patch's surroundings, less their mean."""
    small = np.stack(
        [cv2.resize(one, None, fx=1 / PATCH, fy=1 / PATCH, interpolation=cv2.INTER_AREA) for one in crops]
    )
    wide = np.pad(small.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    size = small.shape[1]
    around = [wide[:, dy : dy + size, dx : dx + size] for dy in range(3) for dx in range(3)]
    stacked = np.concatenate(around, axis=-1)
    return stacked - stacked.mean(axis=-1, keepdims=True)


def test_views_of_a_plane_are_matched(tmp_path: Path) -> None:
    metric = Correspondence(use="correspondence", data=planes(tmp_path), alpha=(0.05, 0.1))
    metric.check()
    found = metric.measure(model(detailed, 96))
    assert found["recall_at_0.1"].value > 0.9
    assert found["recall_at_0.05"].value <= found["recall_at_0.1"].value
    assert (found["recall_at_0.1"].split, found["recall_at_0.1"].num) == ("all pairs", 4)
    assert metric.picture(tmp_path / "shown.png")
    assert not Correspondence(use="correspondence", data=metric.data).picture(tmp_path / "none.png")

    def noise(crops: np.ndarray) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(len(crops), 24, 24, 5))

    # By chance a match is within a circle of the radius: 3 % of the square.
    assert metric.measure(model(noise, 96))["recall_at_0.1"].value < 0.07


def test_a_true_place_is_where_opencv_says() -> None:
    """Features that name their own place in the other view: every match is the patch of OpenCV's point."""
    matrix = np.array([[0.9, 0.1, 5], [-0.05, 1.1, -3], [1e-4, 2e-4, 1]])
    size, grid = 64, 16
    centres = (np.arange(grid) + 0.5) * size / grid
    points = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 1, 2)
    true = cv2.perspectiveTransform(points, matrix)[:, 0]
    inside = ((true >= 0) & (true < size)).all(axis=1)
    other = np.eye(grid * grid).reshape(grid, grid, -1)
    at = np.clip(true // (size / grid), 0, grid - 1).astype(int)
    first = np.eye(grid * grid)[at[:, 1] * grid + at[:, 0]].reshape(grid, grid, -1)
    places, found, errors = matches(first, other, matrix, size)
    expected = np.linalg.norm((at + 0.5) * size / grid - true, axis=1)[inside]
    assert len(errors) == inside.sum()
    assert np.allclose(errors, expected)
    assert np.allclose(places, points[inside, 0])
    assert np.allclose(found, (at[inside] + 0.5) * size / grid)
    assert errors.max() <= np.hypot(2, 2) + 1e-9


def test_a_crop_of_a_wide_picture() -> None:
    x, y, one = crop((50, 100, 3), 25) @ np.array([50, 25, 1])
    assert (x, y, one) == (12.5, 12.5, 1)


def _no_view(root: Path) -> None:
    (root / "plane-1" / "3.ppm").unlink()


def _no_matrix(root: Path) -> None:
    (root / "plane-0" / "H_1_2").write_text("1 0\n0 1\n")


def _words(root: Path) -> None:
    (root / "plane-0" / "H_1_2").write_text("one two three\n")


def _nothing(root: Path) -> None:
    for path in root.glob("*/H_*"):
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_no_view, "plane-1/H_1_3 has no view 3"),
        (_no_matrix, "the homography has 2x2 numbers"),
        (_words, "the homography cannot be read"),
        (_nothing, "there are no pairs of views"),
    ],
)
def test_what_is_wrong_with_pairs(tmp_path: Path, harm: Callable[[Path], None], said: str) -> None:
    data = planes(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        Correspondence(use="correspondence", data=data).check()
    assert caught.value.hint


def test_views_are_read_whole(tmp_path: Path) -> None:
    data = planes(tmp_path)
    first, other, matrix = read_pair(data, data.pairs()[0])
    assert first.shape == other.shape == (96, 128, 3)
    assert matrix.shape == (3, 3)


# --- what says nothing, or is not what it is called ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["validation", "test"])
def test_masks_of_a_split_of_which_nothing_counts_are_one_message(tmp_path: Path, name: str) -> None:
    metric = LinearSegmentation(use="linear_segmentation", data=masks(tmp_path))
    splits = metric._open(model()).splits
    pairs = metric.data.pairs()
    for row in splits[name]:
        path = tmp_path / pairs[int(row)][1]
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    again = LinearSegmentation(use="linear_segmentation", data=metric.data)
    with pytest.raises(UserError, match=rf"no pixel of the \d+ masks of {name} counts"):
        again.measure(model())


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_split_without_depth_is_one_message(tmp_path: Path, name: str) -> None:
    metric = LinearDepth(use="linear_depth", data=depth_set(tmp_path))
    _, splits = metric._open(model())
    pairs = metric.data.pairs()
    for row in splits[name]:
        path = tmp_path / pairs[int(row)][1]
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    for ask in (metric.measure, *([] if name == "validation" else [metric.floor])):
        with pytest.raises(UserError, match=f"no picture of {name} has depth that counts"):
            ask(model())


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_depth_of_8_bits_is_no_depth(tmp_path: Path, mode: str) -> None:
    data = depth_set(tmp_path)
    Image.fromarray(np.arange(36 * 48, dtype=np.uint8).reshape(36, 48)).convert(mode).save(
        tmp_path / "depth" / "3.png"
    )
    with pytest.raises(
        UserError, match=f"a picture of mode {mode}, whose pixels have 8 bits or fewer"
    ) as caught:
        DensePictures(data).check()
    assert caught.value.where == str(tmp_path / "depth" / "3.png")


def test_only_what_is_a_png_is_read_as_a_target_and_only_files_as_homographies(
    tmp_path: Path,
) -> None:
    """Pillow starts a program for some formats, and a pipe holds up whoever reads it."""
    postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 52 40\n%%ImageData: 52 40 8 1 0 1 1 "x"\n%%EndComments\n'
    data = masks(tmp_path / "masks")
    (tmp_path / "masks" / data.pairs()[0][1]).write_bytes(postscript)
    with pytest.raises(UserError, match="it is not a PNG"):
        DensePictures(data).check()
    views = planes(tmp_path / "planes")
    first, other, matrix = views.pairs()[0]
    (tmp_path / "planes" / matrix).unlink()
    os.mkfifo(tmp_path / "planes" / matrix)
    with pytest.raises(UserError, match="the homography cannot be read: not a regular file"):
        read_pair(views, (first, other, matrix))
    (tmp_path / "planes" / first).write_bytes(postscript)
    with pytest.raises(UserError, match="a file of the data set cannot be read"):
        read_pair(views, (first, other, matrix))


def test_the_key_knows_which_folder_a_picture_is_in(tmp_path: Path) -> None:
    """Also where all files come in the order that they had before."""
    for split, numbers in (("training", (0, 1)), ("validation", (2, 3))):
        for at in numbers:
            pixels, classes = scene(at)
            save(tmp_path / "images" / split / f"{at}.png", pixels)
            save(tmp_path / "annotations" / split / f"{at}.png", classes)
    metric = LinearSegmentation(use="linear_segmentation", data=MaskData(path=tmp_path, layout="ade20k"))

    def key() -> dict[str, list[bytes]]:
        return {field: [path.read_bytes() for path in paths] for field, paths in metric.files().items()}

    before = key()
    assert key() == before
    for part in ("images", "annotations"):
        (tmp_path / part / "training/1.png").rename(tmp_path / part / "validation/1.png")
    assert key()["data"] == before["data"]
    assert key() != before
