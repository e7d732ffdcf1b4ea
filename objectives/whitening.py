"""PHI-S: features of a teacher on one scale, without favouring any direction (PHI Standardization, arXiv 2410.01680).

Teachers' features differ in scale by orders of magnitude, and within one teacher a few directions carry most of the
variance. PHI-S turns the principal axes by a Hadamard matrix, which gives every dimension the same variance, and
divides by that one number. So distances and angles around the mean stay what they were, up to the one factor, and
errors in all dimensions count alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_CORE = 2048
# Of the mean variance: far above rounding, far below what is measured.
_TILT = 1e-6


class Whitening(NamedTuple):
    """An affine map of features: (x − mean) · rotation.

    Attributes:
        mean_D: of the features it was made from.
        rotation_DD: an orthogonal matrix divided by the one scale.
    """

    mean_D: Tensor
    rotation_DD: Tensor

    def __call__(self, features_XD: Tensor) -> Tensor:
        """(…, D) → (…, D), fp32."""
        return (features_XD.float() - self.mean_D) @ self.rotation_DD


def phi_s(mean_D: Tensor, covariance_DD: Tensor) -> Whitening:
    """The whitening of features with this mean and covariance: x → H·Uᵀ·(x − mean) / φ with φ² = trace(Σ) / D.

    U are the eigenvectors of the covariance, H a normalised Hadamard matrix (arXiv 2410.01680, section 3.2). Each
    output dimension has variance 1.

    Args:
        mean_D: float.
        covariance_DD: float64; may have any rank but 0.

    Returns:
        fp32.

    Raises:
        ValueError: all features are the same, or there is no Hadamard matrix of this width (see `hadamard`).
    """
    width = len(mean_D)
    scale = (covariance_DD.diagonal().sum() / width).sqrt()
    if not scale > 0:
        raise ValueError("all features are the same, so they have no scale")
    # Where features have less rank than dimensions, the remaining axes could be any: a slight tilt makes them these,
    # on every machine.
    tilt_D = torch.linspace(0, _TILT, width, dtype=covariance_DD.dtype) * scale**2
    _, axes_DD = torch.linalg.eigh(covariance_DD + tilt_D.diag())
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    largest_D = axes_DD.gather(0, axes_DD.abs().argmax(dim=0, keepdim=True))
    axes_DD = axes_DD * largest_D.sign()
    rotation_DD = axes_DD @ hadamard(width).to(axes_DD).T / scale
    return Whitening(mean_D.float(), rotation_DD.float())


class Moments:
    """Mean and covariance of rows that come in parts, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum_D = torch.zeros(width, dtype=torch.float64)
        self._products_DD = torch.zeros(width, width, dtype=torch.float64)
        self._shift_D: Tensor | None = None

    def add(self, rows_ND: Tensor) -> None:
        """Count these rows."""
        rows_ND = rows_ND.detach().to("cpu", torch.float64)
        if self._shift_D is None:
            # Products of rows near zero: those of a mean far from it would drown the covariance.
            self._shift_D = rows_ND.mean(dim=0)
        rows_ND = rows_ND - self._shift_D
        self.count += len(rows_ND)
        self._sum_D += rows_ND.sum(dim=0)
        self._products_DD += rows_ND.T @ rows_ND

    def whitening(self) -> Whitening:
        """PHI-S of all rows so far; raises as :func:`phi_s`."""
        assert self._shift_D is not None, "no rows"
        mean_D = self._sum_D / self.count
        covariance_DD = self._products_DD / self.count - mean_D[:, None] * mean_D
        return phi_s(mean_D + self._shift_D, covariance_DD)


def hadamard(size: int) -> Tensor:
    """A normalised Hadamard matrix (size, size): orthogonal, all entries ± 1 / √size; float64.

    By Sylvester's doubling of one of Paley's two constructions (1933), which makes every width in use.

    Raises:
        ValueError: none of these has that size (of multiples of 4, the first is 52).
    """
    core = size // (size & -size)  # its odd part
    while (found := _core(core)) is None:
        core *= 2
        if core > size:
            raise ValueError(f"no Hadamard matrix of width {size} is known here")
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    normalised: Tensor = found / size**0.5
    return normalised


def _core(size: int) -> Tensor | None:
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size > _LARGEST_CORE or size % 4:
        return None
    if _is_prime(size - 1):  # then it is 3 modulo 4: Paley's first
        return torch.eye(size, dtype=torch.float64) + _conference(size - 1, -1)
    half = size // 2 - 1
    if half % 4 == 1 and _is_prime(half):  # Paley's second
        conference = _conference(half, 1)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(torch.eye(half + 1, dtype=torch.float64), minus)
    return None


def _conference(prime: int, sign: int) -> Tensor:
    """Paley's matrix of quadratic residues with a border: (prime + 1)², zero diagonal, other entries ± 1."""
    residues = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if n in residues else -1.0 for n in range(1, prime)])
    numbers = torch.arange(prime)
    out = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    out[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    out[0, 1:] = 1
    out[1:, 0] = sign
    return out


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))
