"""PHI-S against its definition in NumPy, Hadamard matrices against theirs, and moments that come in parts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from orchestrator.objectives.whitening import Moments, hadamard, phi_s

# Sylvester, both of Paley's constructions, and doublings of them; the widths of towers in use are among these.
WIDTHS = [1, 2, 4, 12, 16, 20, 36, 48, 96, 128, 192, 320, 384, 768, 1152, 1280, 1536]


@pytest.mark.parametrize("size", WIDTHS)
def test_hadamard_is_orthogonal_with_equal_entries(size: int) -> None:
    made = hadamard(size)
    torch.testing.assert_close(made @ made.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(made.abs(), torch.full_like(made, size**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [3, 6, 10, 52, 1001])
def test_no_hadamard_of_other_widths(size: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of width {size}"):
        hadamard(size)


def features(count: int, width: int) -> np.ndarray:
    """Correlated, of scales from 0.1 to 10, far from zero."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width)) * np.logspace(-1, 1, width)
    return rng.normal(size=(count, width)) @ mix.T + 30 * rng.normal(size=width)


@pytest.mark.parametrize("width", [8, 12])
def test_phi_s_is_hadamard_rotated_pca_of_one_scale(width: int) -> None:
    rows = features(500, width)
    whitening = phi_s(torch.from_numpy(rows.mean(0)), torch.from_numpy(np.cov(rows.T, bias=True)))
    got = whitening(torch.from_numpy(rows)).double().numpy()

    variances, axes = np.linalg.eigh(np.cov(rows.T, bias=True))
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(width)])
    rotation = scipy.linalg.hadamard(width) / width**0.5 if width == 8 else hadamard(width).numpy()
    wanted = (rows - rows.mean(0)) @ axes @ rotation.T / np.sqrt(variances.mean())
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_every_dimension_gets_variance_one_and_distances_keep_their_ratios() -> None:
    rows = features(400, 24)
    moments = Moments(24)
    moments.add(torch.from_numpy(rows))
    got = moments.whitening()(torch.from_numpy(rows)).double().numpy()
    np.testing.assert_allclose(got.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(got.var(0), 1, rtol=1e-3)
    assert rows.var(0).max() > 3 * rows.var(0).min(), "or there would be nothing to even out"
    before, after = (np.linalg.norm(x[1:] - x[:-1], axis=1) for x in (rows, got))
    np.testing.assert_allclose(after / before, (after / before).mean(), rtol=1e-3)


def test_moments_in_parts_are_moments_of_all() -> None:
    """Far from zero: sums of plain squares would lose the variance."""
    rows = 1e-3 * features(300, 4) + 1e6
    parts, whole = Moments(4), Moments(4)
    for part in np.array_split(rows, [7, 150, 151]):
        parts.add(torch.from_numpy(part))
    whole.add(torch.from_numpy(rows))
    expected = phi_s(torch.from_numpy(rows.mean(0)), torch.from_numpy(np.cov(rows.T, bias=True)))
    for found in (parts.whitening(), whole.whitening()):
        torch.testing.assert_close(found.mean_D, expected.mean_D)
        torch.testing.assert_close(found.rotation_DD, expected.rotation_DD, rtol=1e-4, atol=1e-4)


def test_axes_without_variance_are_the_same_however_the_rows_came() -> None:
    """Fewer rows than dimensions, as of a wide teacher: sums in another order must not turn what new rows become."""
    rows = torch.from_numpy(features(20, 48)).float()
    new = torch.from_numpy(features(120, 48)[100:]).float()
    found = []
    for order in (torch.arange(20), torch.randperm(20, generator=torch.Generator().manual_seed(0))):
        moments = Moments(48)
        for part in rows[order].split(7):
            moments.add(part)
        found.append(moments.whitening()(new))
    assert found[0].abs().mean() > 0.1
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_equal_rows_have_no_scale() -> None:
    moments = Moments(4)
    moments.add(torch.ones(5, 4))
    with pytest.raises(ValueError, match="all features are the same"):
        moments.whitening()
