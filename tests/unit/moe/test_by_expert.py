"""Experts on a CPU, one a thread: what a loop computes, with the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.moe import by_expert
from trainer.moe.by_expert import swiglu_by_expert

MANY = [300, 0, 517, 256, 1, 400, 290, 333]
"""Rows of experts: none, one, a block, and more than one."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(counts: list[int], dtype: torch.dtype, dim: int = 24, ffn_dim: int = 40) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(sum(counts), dim), *2 * [(len(counts), dim, ffn_dim)], (len(counts), ffn_dim, dim)]
    leaves = [torch.randn(shape, generator=g).mul_(0.4).to(dtype) for shape in shapes]
    wide = torch.promote_types(dtype, torch.float32)
    return [x.requires_grad_() for x in (*leaves, torch.rand(sum(counts), generator=g).to(wide))]


def answers(leaves: list[Tensor], counts: list[int], weighted: bool = True) -> list[Tensor]:
    x, w1, w3, w2, weight = leaves
    y = swiglu_by_expert(x, counts, w1, w3, w2, weight if weighted else None)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves if weighted else leaves[:4], probe)]


def truth(leaves: list[Tensor], counts: list[int], weighted: bool = True) -> list[Tensor]:
    x, w1, w3, w2, weight = doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    parts = []
    for e, (rows, factor) in enumerate(zip(x.split(counts), weight.split(counts), strict=True)):
        y = (F.silu(rows @ w1[e]) * (rows @ w3[e])) @ w2[e]
        parts.append(y * factor[:, None] if weighted else y)
    y = torch.cat(parts)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(leaves[0].dtype).double()
    return [y.detach(), *torch.autograd.grad(y, doubles if weighted else doubles[:4], probe)]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)]
)
def test_equals_a_loop(dtype: torch.dtype, tolerance: float, threads: int, weighted: bool) -> None:
    torch.set_num_threads(threads)
    leaves = inputs(MANY, dtype)
    for found, wanted in zip(answers(leaves, MANY, weighted), truth(leaves, MANY, weighted), strict=True):
        assert float((found.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    leaves = inputs(MANY, dtype, 96, 160)
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(answers(leaves, MANY))
        assert torch.get_num_threads() == threads
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("counts", [[900, 3, 0, 20], [0, 0, 0, 7], [0, 0, 0, 0]])
def test_all_rows_to_one_expert(counts: list[int]) -> None:
    torch.set_num_threads(2)
    leaves = inputs(counts, torch.float64)
    for found, wanted in zip(answers(leaves, counts), truth(leaves, counts), strict=True):
        torch.testing.assert_close(found, wanted)


def test_without_gradients() -> None:
    torch.set_num_threads(2)
    leaves = inputs(MANY, torch.float32)
    wanted = answers(leaves, MANY)[0]
    x, w1, w3, w2, weight = leaves
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(swiglu_by_expert(x, MANY, w1, w3, w2, weight), wanted)


def test_what_fails_in_a_thread_is_raised() -> None:
    torch.set_num_threads(2)
    x, w1, w3, w2, weight = inputs(MANY, torch.float32)
    with pytest.raises(RuntimeError):
        swiglu_by_expert(x, MANY, w1, w3, w2[:, :-1], weight)


def test_processors_without_narrow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = inputs(MANY, torch.bfloat16)
    errors = {}
    for factors in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(by_expert, "_factors", lambda dtype, factors=factors: factors)
        pairs = zip(answers(leaves, MANY), truth(leaves, MANY), strict=True)
        errors[factors] = [float((f.double() - w).abs().max() / w.abs().max()) for f, w in pairs]
    assert max(errors[torch.float32]) <= 1e-2 and max(errors[torch.bfloat16]) <= 1e-2
    assert sum(errors[torch.float32]) < sum(errors[torch.bfloat16])
