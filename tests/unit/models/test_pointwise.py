"""RMSNorm and rotary embedding: the same as written out, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.pointwise import rms_norm, rotated


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 8), (1, 1, 1)], ids=str)
def test_the_norm_is_pytorchs(shape: tuple[int, ...]) -> None:
    x, weight, dy = draw(*shape), draw(shape[-1], seed=1), draw(*shape, seed=2).detach()
    found, wanted = rms_norm(x, weight, 1e-5), F.rms_norm(x, weight.shape, weight, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-15)
    for own, right in zip(
        torch.autograd.grad(found, (x, weight), dy), torch.autograd.grad(wanted, (x, weight), dy), strict=True
    ):
        torch.testing.assert_close(own, right, rtol=1e-11, atol=1e-12)


def test_a_row_of_zeros_has_a_norm_and_a_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    found = rms_norm(x, weight, 1e-5)
    found.sum().backward()
    assert not found.any() and x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e-5**-0.5))


@pytest.mark.parametrize("transposed", [False, True])
def test_turning_is_what_its_formula_says(transposed: bool) -> None:
    x, dy = draw(2, 7, 3, 8) if transposed else draw(2, 3, 7, 8), draw(2, 3, 7, 8, seed=1).detach()
    angles = draw(7, 4, seed=2).detach().repeat(1, 2)
    given = x.transpose(1, 2) if transposed else x
    first, second = given.chunk(2, dim=-1)
    wanted = given * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    found = rotated(given, angles.cos(), angles.sin())
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, dy)[0], torch.autograd.grad(wanted, x, dy)[0], rtol=1e-14, atol=1e-14
    )
