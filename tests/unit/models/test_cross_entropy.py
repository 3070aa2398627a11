"""The head and its loss: what F.cross_entropy over whole logits gives, without whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.live import LiveLog
from trainer.data.batch import IGNORED
from trainer.models import cross_entropy
from trainer.models.cross_entropy import linear_cross_entropy

N, D, V = 300, 24, 50


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and targets, a fifth of them ignored; large logits among them."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[torch.rand(N, generator=g) < 0.2] = IGNORED
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED, reduction="sum")


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


# float64: only the order of additions differs. bf16: 8 bits of mantissa, sums of 50 and 300 products.
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("factor", [1.0, 1 / 2047])
def test_loss_and_gradients_are_those_of_whole_logits(
    dtype: torch.dtype, limit: float, factor: float
) -> None:
    x, weight, targets = inputs(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    right = plain(*wide, targets)
    found = linear_cross_entropy(x, weight, targets)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), right, rtol=limit, atol=0)
    for own, wanted in zip(
        gradients(found * factor, x, weight), gradients(right * factor, *wide), strict=True
    ):
        assert own.dtype == dtype
        assert (own.double() - wanted).abs().max() <= limit * wanted.abs().max()


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = inputs(torch.float64)
    whole = linear_cross_entropy(x, weight, targets)
    monkeypatch.setattr(cross_entropy, "_BYTES", {"cpu": 0})
    monkeypatch.setattr(cross_entropy, "_ROWS", 7)
    cut = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(cut, whole, rtol=1e-14, atol=0)
    for one, other in zip(gradients(cut, x, weight), gradients(whole, x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_ignored_rows_give_nothing_whatever_is_in_them() -> None:
    x, weight, targets = inputs(torch.float32)
    broken = torch.where((targets == IGNORED)[:, None], torch.nan, x.detach()).requires_grad_()
    loss = linear_cross_entropy(broken, weight, targets)
    assert torch.equal(loss, linear_cross_entropy(x, weight, targets))
    (dx,) = gradients(loss, broken)
    assert torch.isfinite(dx).all() and not dx[targets == IGNORED].any()
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORED))
    assert nothing.item() == 0 and not any(g.any() for g in gradients(nothing, x, weight))


def test_only_what_is_wanted_is_computed() -> None:
    x, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, targets)
    assert not found.requires_grad
    (dx,) = gradients(linear_cross_entropy(x, weight.detach(), targets), x)
    (dweight,) = gradients(linear_cross_entropy(x.detach(), weight, targets), weight)
    both = gradients(linear_cross_entropy(x, weight, targets), x, weight)
    assert torch.equal(dx, both[0]) and torch.equal(dweight, both[1])


def test_logits_never_stand_there_as_a_whole() -> None:
    rows, words = 4096, 4096
    x = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(words, 8, requires_grad=True)
    with LiveLog() as live:
        linear_cross_entropy(x, weight, torch.zeros(rows, dtype=torch.int64)).backward()
    assert live.peak_without([]) < rows * words * 4 / 4
