from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from orchestrator.objectives.contrastive import Normalisers, info_nce, log_normaliser


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(image: Tensor, text: Tensor, scale: float) -> float:
    unit = lambda rows: [r / r.norm() for r in rows.double()]  # noqa: E731
    x, y, total = unit(image), unit(text), 0.0
    for i in range(len(x)):
        rows = [math.exp(scale * float(x[i] @ b)) for b in y]
        columns = [math.exp(scale * float(a @ y[i])) for a in x]
        total += -math.log(rows[i] / sum(rows)) - math.log(columns[i] / sum(columns))
    return total / 2 / len(x)


def test_equals_the_definition() -> None:
    image, text = randn(6, 4), randn(6, 4, seed=1)
    assert info_nce(image, text, 7.0).item() == pytest.approx(naive(image, text, 7.0), rel=1e-5)


def test_matched_pairs_have_a_low_loss_and_unrelated_ones_log_n() -> None:
    image = torch.eye(8)
    assert info_nce(image, image, 100.0).item() == pytest.approx(0.0, abs=1e-5)
    assert info_nce(torch.ones(8, 3), torch.ones(8, 3), 100.0).item() == pytest.approx(math.log(8), rel=1e-5)


def global_gradients(image: Tensor, text: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(info_nce(image, text, log_scale.exp()), (image, text, log_scale))


def blockwise_gradients(
    image: Tensor, text: Tensor, log_scale: Tensor, *, size: int, with_normalisers: bool
) -> tuple[float, tuple[Tensor, ...]]:
    scale, columns = log_scale.exp(), (image.detach(), text.detach())
    normalisers = Normalisers(log_normaliser(*columns, scale), log_normaliser(*columns[::-1], scale))
    losses = [
        info_nce(
            image[at : at + size],
            text[at : at + size],
            scale,
            all_image_ND=columns[0],
            all_text_ND=columns[1],
            offset=at,
            normalisers=normalisers if with_normalisers else None,
        )
        for at in range(0, len(image), size)
    ]
    loss = torch.stack(losses).mean()
    return loss.item(), torch.autograd.grad(loss, (image, text, log_scale))


@pytest.mark.parametrize("size", [1, 3, 6])
def test_blocks_with_normalisers_have_the_gradient_of_the_global_batch(size: int) -> None:
    image, text = randn(6, 4).requires_grad_(), randn(6, 4, seed=1).requires_grad_()
    log_scale = torch.tensor(1.5, requires_grad=True)
    expected = global_gradients(image, text, log_scale)
    value, gradients = blockwise_gradients(image, text, log_scale, size=size, with_normalisers=True)
    assert value == pytest.approx(info_nce(image, text, log_scale.exp()).item(), rel=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_constant_columns_alone_give_the_value_but_not_the_gradient() -> None:
    image, text = randn(6, 4).requires_grad_(), randn(6, 4, seed=1).requires_grad_()
    log_scale = torch.tensor(1.5, requires_grad=True)
    value, gradients = blockwise_gradients(image, text, log_scale, size=3, with_normalisers=False)
    expected = global_gradients(image, text, log_scale)
    assert value == pytest.approx(info_nce(image, text, log_scale.exp()).item(), rel=1e-5)
    assert (gradients[0] - expected[0]).norm() > 0.1 * expected[0].norm()


def test_columns_that_carry_gradients_need_no_normalisers() -> None:
    image, text = randn(6, 4).requires_grad_(), randn(6, 4, seed=1).requires_grad_()
    columns = {"all_image_ND": image, "all_text_ND": text}
    halves = [info_nce(image[at : at + 3], text[at : at + 3], 4.0, **columns, offset=at) for at in (0, 3)]
    got = torch.autograd.grad(torch.stack(halves).mean(), (image, text))
    torch.testing.assert_close(got, torch.autograd.grad(info_nce(image, text, 4.0), (image, text)))


def test_misuse_is_refused() -> None:
    rows, normalisers = randn(2, 4), Normalisers(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="both"):
        info_nce(rows, rows, 1.0, all_image_ND=rows)
    with pytest.raises(ValueError, match="exceed"):
        info_nce(rows, rows, 1.0, all_image_ND=rows, all_text_ND=rows, offset=1)
    with pytest.raises(ValueError, match="normalisers"):
        info_nce(rows, rows, 1.0, normalisers=normalisers)
