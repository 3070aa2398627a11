"""Experts on a CPU, one a thread: what a loop computes, with the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.dispatch.permute import Permutation
from trainer.moe import by_expert
from trainer.moe.by_expert import swiglu_by_expert, swiglu_of_tokens

Compute = Callable[[list[Tensor], list[int]], Tensor]

MANY = [300, 0, 517, 256, 1, 400, 290, 334]
"""Rows of experts: none, one, a block, and more than one."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(counts: list[int], dtype: torch.dtype, dim: int = 24, ffn_dim: int = 40) -> list[Tensor]:
    """Rows, or as many tokens as half of them, then the weights of experts and of pairs."""
    g = torch.Generator().manual_seed(0)
    shapes = [(sum(counts), dim), *2 * [(len(counts), dim, ffn_dim)], (len(counts), ffn_dim, dim)]
    leaves = [torch.randn(shape, generator=g).mul_(0.4).to(dtype) for shape in shapes]
    wide = torch.promote_types(dtype, torch.float32)
    return [x.requires_grad_() for x in (*leaves, torch.rand(sum(counts), generator=g).to(wide))]


def of_rows(leaves: list[Tensor], counts: list[int]) -> Tensor:
    return swiglu_by_expert(leaves[0], counts, *leaves[1:4])


def of_tokens(leaves: list[Tensor], counts: list[int]) -> Tensor:
    x, w1, w3, w2, weight = leaves
    home = permutation(counts)
    return swiglu_of_tokens(x[: len(home.row_of_pair_TK)], weight.view(-1, 2), home, counts, w1, w3, w2)


def permutation(counts: list[int]) -> Permutation:
    """Between the two choices of each token and their rows; a token may choose an expert twice."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = torch.randperm(len(expert), generator=torch.Generator().manual_seed(2))
    return Permutation.by_key(expert[order].view(-1, 2))


def answers(leaves: list[Tensor], counts: list[int], compute: Compute = of_tokens) -> list[Tensor]:
    y = compute(leaves, counts)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(leaves[0].dtype).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, probe, allow_unused=True)
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def loop_of_rows(leaves: list[Tensor], counts: list[int]) -> Tensor:
    x, w1, w3, w2, _ = leaves
    runs = enumerate(x.split(counts))
    return torch.cat([(F.silu(rows @ w1[e]) * (rows @ w3[e])) @ w2[e] for e, rows in runs])


def loop_of_tokens(leaves: list[Tensor], counts: list[int]) -> Tensor:
    x, *stacks, weight = leaves
    home = permutation(counts)
    rows = loop_of_rows([x[home.token_of_row_N], *stacks, weight], counts)
    return (rows[home.row_of_pair_TK] * weight.view(-1, 2, 1)).sum(1)


LOOPS = {of_rows: loop_of_rows, of_tokens: loop_of_tokens}


def truth(leaves: list[Tensor], counts: list[int], compute: Compute = of_tokens) -> list[Tensor]:
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = LOOPS[compute](doubles, counts)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(leaves[0].dtype).double()
    grads = torch.autograd.grad(y, doubles, probe, allow_unused=True)
    return [y.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("compute", [of_rows, of_tokens])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)]
)
def test_equals_a_loop(dtype: torch.dtype, tolerance: float, threads: int, compute: Compute) -> None:
    torch.set_num_threads(threads)
    leaves = inputs(MANY, dtype)
    for found, wanted in zip(answers(leaves, MANY, compute), truth(leaves, MANY, compute), strict=True):
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


@pytest.mark.parametrize("counts", [[900, 3, 0, 21], [0, 0, 0, 8], [0, 0, 0, 0]])
def test_all_rows_to_one_expert(counts: list[int]) -> None:
    torch.set_num_threads(2)
    leaves = inputs(counts, torch.float64)
    for found, wanted in zip(answers(leaves, counts), truth(leaves, counts), strict=True):
        torch.testing.assert_close(found, wanted)


def test_without_gradients() -> None:
    torch.set_num_threads(2)
    leaves = inputs(MANY, torch.float32)
    wanted = answers(leaves, MANY)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(of_tokens(leaves, MANY), wanted)


def test_what_fails_in_a_thread_is_raised() -> None:
    torch.set_num_threads(2)
    x, w1, w3, w2, _ = inputs(MANY, torch.float32)
    with pytest.raises(RuntimeError):
        swiglu_by_expert(x, MANY, w1, w3, w2[:, :-1])


def test_processors_without_narrow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = inputs(MANY, torch.bfloat16)
    errors = {}
    for factors in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(by_expert, "multiplied_in", lambda dtype, factors=factors: factors)
        pairs = zip(answers(leaves, MANY), truth(leaves, MANY), strict=True)
        errors[factors] = [float((f.double() - w).abs().max() / w.abs().max()) for f, w in pairs]
    assert max(errors[torch.float32]) <= 1e-2 and max(errors[torch.bfloat16]) <= 1e-2
    assert sum(errors[torch.float32]) < sum(errors[torch.bfloat16])
