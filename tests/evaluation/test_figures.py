from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import orchestrator
from orchestrator.evaluation.report.figures import bars, curves, pca_colors, pca_maps

WHITE = np.array([255, 255, 255])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_color(picture: np.ndarray, color: str) -> bool:
    rgb = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return bool((picture == rgb).all(axis=-1).sum() > 20)


def photo(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def two_halves(height: int, width: int) -> np.ndarray:
    """Left half one direction, right half another, and a little noise; 8 dimensions."""
    features = 0.01 * np.random.default_rng(0).normal(size=(height, width, 8))
    features[:, : width // 2, 0] += 1.0
    features[:, width // 2 :, 1] += 1.0
    return features


def test_pca_colors_separate_what_the_features_separate() -> None:
    (colors,) = pca_colors([two_halves(6, 8)])
    assert colors.shape == (6, 8, 3)
    assert colors.min() >= 0.0
    assert colors.max() <= 1.0
    assert abs(colors[:, :4, 0].mean() - colors[:, 4:, 0].mean()) > 0.9


def test_pca_is_joint_over_photos_of_any_grid() -> None:
    whole = two_halves(6, 8)
    (together,) = pca_colors([whole])
    left, right = pca_colors([whole[:, :3], whole[:, 3:]])
    # The same set of patches, so the same colours, however it is cut.
    np.testing.assert_allclose(np.concatenate([left, right], axis=1), together, atol=1e-6)


def test_pca_spans_the_2nd_to_98th_percentile() -> None:
    features = np.random.default_rng(0).normal(size=(20, 20, 5))
    features[0, 0] = 1e3
    (colors,) = pca_colors([features])
    for channel in range(1, 3):
        assert (colors[..., channel] == 0).mean() == pytest.approx(0.02, abs=0.005)
        assert colors[..., channel].std() > 0.2


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_features_without_spread_or_with_few_dimensions_are_gray(dim: int) -> None:
    (colors,) = pca_colors([np.ones((4, 4, dim), dtype=np.float32)])
    np.testing.assert_array_equal(colors, np.full((4, 4, 3), 0.5))


def test_pca_maps_show_the_photo_and_its_map_side_by_side(tmp_path: Path) -> None:
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[..., 0] = 255
    pca_maps([red], [np.ones((4, 4, 3))], tmp_path / "new" / "maps.png")
    picture = pixels(tmp_path / "new" / "maps.png")
    height, width, _ = picture.shape
    np.testing.assert_array_equal(picture[height // 2, width // 4], [255, 0, 0])
    np.testing.assert_allclose(picture[height // 2, 3 * width // 4], 127, atol=1)
    assert 1.9 < width / height < 2.1
    # No axes, no frame: all that is not picture is white, and there is little of it.
    assert (picture == WHITE).all(axis=-1).mean() < 0.06


def test_rows_titles_and_mixed_shapes(tmp_path: Path) -> None:
    photos = [photo(), photo(24, 48, 1), photo(48, 24, 2)]
    features = [two_halves(4, 4), two_halves(3, 6), two_halves(6, 3)]
    pca_maps(photos, features, tmp_path / "column.png", ["dal", "idli & chutney $x$", ""])
    pca_maps(photos, features, tmp_path / "wide.png", pairs_per_row=2)
    column, wide = pixels(tmp_path / "column.png"), pixels(tmp_path / "wide.png")
    assert column.shape[0] > 1.4 * column.shape[1]
    assert wide.shape[1] == pytest.approx(2 * wide.shape[0], abs=4)
    # The fourth place of the 2×2 grid stays empty.
    assert (wide[wide.shape[0] // 2 + 8 :, wide.shape[1] // 2 + 8 :] == WHITE).all()


def test_photos_and_features_must_pair_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pair up"):
        pca_maps([photo()], [], tmp_path / "x.png")
    with pytest.raises(ValueError, match="pair up"):
        pca_maps([photo()], [two_halves(4, 4)], tmp_path / "x.png", ["a", "b"])
    with pytest.raises(ValueError, match="pair up"):
        pca_maps([], [], tmp_path / "x.png")


def test_curves_draw_every_series(tmp_path: Path) -> None:
    series = {"pretrain": ([0, 1, 2], [3.0, 2.0, 1.5]), "gram": ([2, 3, 4], [1.4, float("nan"), 1.0])}
    curves(series, tmp_path / "c.png", "Loss", "loss")
    picture = pixels(tmp_path / "c.png")
    assert has_color(picture, "#0072B2")
    assert has_color(picture, "#D55E00")
    curves({"pretrain": series["pretrain"]}, tmp_path / "one.png", "Loss", "loss")
    assert not has_color(pixels(tmp_path / "one.png"), "#D55E00")


def test_bars_are_as_long_as_their_values(tmp_path: Path) -> None:
    table = [("random", 0.2, "baseline"), ("ours", 0.8, "model")]
    bars(table, tmp_path / "b.png", "k-NN")
    picture = pixels(tmp_path / "b.png")
    lengths = [
        (picture == rgb).all(axis=-1).sum(axis=1).max() for rgb in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00])
    ]
    assert lengths[1] / lengths[0] == pytest.approx(4.0, rel=0.02)


def test_bars_show_how_sure_they_are(tmp_path: Path) -> None:
    table = [("ours", 0.5, "model")]
    bars(table, tmp_path / "plain.png", "k-NN")
    bars(table, tmp_path / "sure.png", "k-NN", errors=[0.1])
    bar = [0x00, 0x72, 0xB2]
    plain, sure = pixels(tmp_path / "plain.png"), pixels(tmp_path / "sure.png")
    # The error bar lies across the bar, and the axis reaches out to its end.
    assert (sure == bar).all(axis=-1).sum() < (plain == bar).all(axis=-1).sum()
    with pytest.raises(ValueError, match="2 errors for 1 bars"):
        bars(table, tmp_path / "x.png", "k-NN", errors=[0.1, 0.1])


def test_bars_mark_baselines(tmp_path: Path) -> None:
    table = [("ours", 0.2, "model")]
    bars(table, tmp_path / "plain.png", "k-NN")
    bars(table, tmp_path / "marked.png", "k-NN", {"teacher": 0.8})
    plain, marked = pixels(tmp_path / "plain.png"), pixels(tmp_path / "marked.png")
    bar = [0x00, 0x72, 0xB2]
    # The axis reaches out to the baseline, so the bar takes a smaller share of it.
    assert (marked == bar).all(axis=-1).sum() < 0.5 * (plain == bar).all(axis=-1).sum()


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no points"):
        curves({"a": ([], [])}, tmp_path / "x.png", "t", "y")
    with pytest.raises(ValueError, match="no bars"):
        bars([], tmp_path / "x.png", "t")


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        pca_maps([photo()], [two_halves(4, 4)], tmp_path / name, ["dal"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.heavy
def test_neither_pyplot_nor_torch_is_imported() -> None:
    code = (
        "import sys, orchestrator.evaluation.report.figures, orchestrator.evaluation.metrics.knn\n"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(orchestrator.__file__).parents[1])
