"""Gated experts on a CPU: an expert a thread, a block of rows at a time, little kept for backward.

    forward     h = silu(x w1) ∘ (x w3)        y = Σ weight · (h w2)
    backward    dh = dy w2ᵀ                    dweight = ⟨dh, h⟩ (so y need not be kept: SonicMoE, arXiv:2512.14080)

Combine weights meet rows where these are narrow: x and dy in the gradients of an expert's weights, answers and dx
on their way home. Kept are x and the two projections; h is computed again: one pass, where keeping it costs memory.
Rows are taken from the tokens, and their gradients from the tokens', by the block: neither ever stands there as a
whole. All rows, of whatever experts, are cut into a few equal runs; a thread computes a run by itself and waits for
no other before its end. Up to 4 threads the cuts, and so the bits, do not depend on their number.

Narrow types are multiplied in fp32, an expert's weights at a time, on processors that would have to take them apart
(bf16 without AVX512-BF16 or AMX: a third of fp32's speed); between products all is at least fp32.

Shape suffixes: T tokens, K choices a token, N rows, E experts, D model width, F expert width.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.dispatch.permute import Permutation, take, weighted_sum

_ROWS = 512
"""Of a block in fp32, twice as many in half of the bytes: half and double are alike, fewer cost more calls."""

_PADDED = 64
"""Narrow products are compiled for each new number of rows, which takes longer than the product itself: so few."""

_RUNS = 4
"""Into how many equal runs all rows are cut, at least: a thread takes one at a time."""

_FEW = 64
"""Rows for which no further thread is woken."""

_silu_backward_into = torch.ops.aten.silu_backward.grad_input


def swiglu_by_expert(
    rows_ND: Tensor, counts: list[int], w1_EDF: Tensor, w3_EDF: Tensor, w2_EFD: Tensor
) -> Tensor:
    """``(silu(x w1) ∘ (x w3)) w2`` of rows sorted by expert, ``[N, D]``.

    Args:
        rows_ND: on the CPU, of any floating type.
        counts: rows of each expert; they sum to N.
        w1_EDF, w3_EDF, w2_EFD: of the rows' type.
    """
    return _ByExpert.apply(rows_ND, w1_EDF, w3_EDF, w2_EFD, None, None, counts)


def swiglu_of_tokens(
    x_TD: Tensor,
    weight_TK: Tensor,
    home: Permutation,
    counts: list[int],
    w1_EDF: Tensor,
    w3_EDF: Tensor,
    w2_EFD: Tensor,
) -> Tensor:
    """``Σ_k weight[t, k] · swiglu(x[t])`` of each token's experts, ``[T, D]``; rows are taken where they are used.

    Args:
        x_TD: on the CPU, of any floating type.
        weight_TK: fp32 or wider.
        home: between the tokens' pairs and rows sorted by expert.
        counts: rows of each expert.
        w1_EDF, w3_EDF, w2_EFD: of the tokens' type.
    """
    return _ByExpert.apply(x_TD, w1_EDF, w3_EDF, w2_EFD, weight_TK, home, counts)


class _ByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        weight_TK: Tensor | None,
        home: Permutation | None,
        counts: list[int],
    ) -> Tensor:
        gate = x.new_empty(sum(counts), w1.shape[2])
        up, out = torch.empty_like(gate), x.new_empty(len(gate), x.shape[1])
        factors, wide = multiplied_in(x.dtype), _wide(x.dtype)
        rows = _rows_of(home)

        def forward(piece: Piece) -> None:
            own1, own3, own2 = (w[piece.expert].to(factors) for w in (w1, w3, w2))
            for block in piece.blocks(x.dtype):
                own = _factor(rows(x, block), factors)
                g, u = _product(own, own1, gate[block]).to(wide), _product(own, own3, up[block])
                _product(_factor(F.silu(g).mul_(u), factors), own2, out[block])

        _each(counts, forward)
        ctx.home, ctx.counts = home, counts
        ctx.save_for_backward(x, gate, up, w1, w3, w2, weight_TK)
        return out if home is None else weighted_sum(out, home.row_of_pair_TK, weight_TK, home.drops)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, w1, w3, w2, weight_TK = ctx.saved_tensors
        home: Permutation | None = ctx.home
        factors, wide = multiplied_in(x.dtype), _wide(x.dtype)
        rows, weight = _rows_of(home), _weight_of_rows(weight_TK, home)
        dx = x.new_empty(len(gate), x.shape[1])
        dws = [torch.empty_like(w) for w in (w1, w3, w2)]
        dweight = None if weight is None else torch.empty_like(weight)

        shared = _Cut()

        def backward(piece: Piece) -> None:
            own1, own3, own2 = (
                w[piece.expert].to(factors).t() for w in (w1, w3, w2)
            )  # [F, D], [F, D], [D, F]
            sums = [_Sum(dw[piece.expert], piece) for dw in dws]
            for block in piece.blocks(x.dtype):
                own, dy = _factor(rows(x, block), factors), _factor(rows(dout, block), factors)
                g, u = gate[block].to(wide), up[block].to(wide)
                a = F.silu(g)
                h, dh = a * u, (dy @ own2)[: len(g)].to(wide)
                if weight is not None and dweight is not None:
                    dweight[block] = torch.linalg.vecdot(dh, h)
                    dy[: len(g)].mul_(weight[block, None])  # copies: weighted here, where they are narrow
                    own[: len(g)].mul_(weight[block, None])
                sums[2].add(_factor(h, factors).t(), dy)
                du = _factor(torch.mul(dh, a, out=a), factors)
                dg = _factor(_silu_backward_into(dh.mul_(u), g, grad_input=h), factors)
                sums[0].add(own.t(), dg)
                sums[1].add(own.t(), du)
                _product(dg, own1, dx[block], du, own3)
            for part in sums:
                part.put(shared)

        _each(ctx.counts, backward)
        if home is None or dweight is None:
            return dx, *dws, None, None, None
        dx = weighted_sum(dx, home.row_of_pair_TK, weight_TK, home.drops)
        dweight_TK = take(dweight, home.row_of_pair_TK.flatten(), home.drops).view_as(weight_TK)
        return dx, *dws, dweight_TK, None, None


def _rows_of(home: Permutation | None) -> Callable[[Tensor, slice], Tensor]:
    """Gives a block of rows: of a tensor that has them, or of one that has tokens."""
    if home is None:
        return lambda rows, block: rows[block]
    token_N, gaps = home.token_of_row_N, home.gaps
    return lambda tokens, block: take(tokens, token_N[block], gaps)


def _weight_of_rows(weight_TK: Tensor | None, home: Permutation | None) -> Tensor | None:
    if weight_TK is None or home is None:
        return None
    return take(weight_TK.flatten(), home.pair_of_row_N, home.gaps)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@cache
def multiplied_in(dtype: torch.dtype) -> torch.dtype:
    """The type in which experts of a type are multiplied on this processor."""
    if dtype == torch.bfloat16 and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return dtype
    return _wide(dtype)


def _factor(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as a factor of products; in narrow types with zeros behind them, up to a multiple of ``_PADDED``."""
    missing = -len(rows) % _PADDED
    if missing == 0 or dtype == _wide(dtype):
        return rows.to(dtype)
    padded = rows.new_empty(len(rows) + missing, rows.shape[1], dtype=dtype)
    padded[: len(rows)] = rows
    padded[len(rows) :] = 0
    return padded


class _Sum:
    """The part of a weight's gradient that a piece of its expert's rows makes: products summed in fp32 (or wider).

    Args:
        out: the gradient; holds nothing yet and may be narrower.
    """

    def __init__(self, out: Tensor, piece: Piece) -> None:
        self.out, self.piece = out, piece
        self.total: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add ``a b``, whose factors may be narrower than the sum."""
        wide = _wide(self.out.dtype)
        if self.total is None:
            inside = self.piece.index == 0 and self.out.dtype == wide == a.dtype
            self.total = torch.mm(a, b, out=self.out) if inside else (a @ b).to(wide)
        elif a.dtype == wide:
            self.total.addmm_(a, b)
        else:
            self.total.add_(a @ b)

    def put(self, shared: _Cut) -> None:
        """Put it where it belongs; ``shared`` does so if other pieces have a part in it."""
        if self.piece.of > 1:
            assert self.total is not None, "no piece of several is empty"
            shared.add(self.out, self.total, self.piece)
        elif self.total is None:
            self.out.zero_()
        elif self.total is not self.out:
            self.out.copy_(self.total)


class _Cut:
    """Adds up the sums of experts whose rows were cut, in the order of the pieces, each as soon as it can be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[int, int], Tensor] = {}
        self._added: dict[int, tuple[Tensor, int]] = {}

    def add(self, out: Tensor, total: Tensor, piece: Piece) -> None:
        """Take the sum of one piece; into ``out`` with the last of them. Keeps nothing of it then."""
        key = out.data_ptr()
        with self._lock:
            self._waiting[key, piece.index] = total
            sums, number = self._added.get(key, (total, 0))
            while (key, number) in self._waiting:
                found = self._waiting.pop((key, number))
                sums = found if number == 0 else sums.add_(found)
                number += 1
            if number:
                self._added[key] = sums, number
            if number == piece.of and sums is not out:
                out.copy_(sums)


def _product(a: Tensor, b: Tensor, out: Tensor, a2: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """``a b (+ a2 b2)``, put into ``out``, which may be narrower and without the padding."""
    direct = out.dtype == a.dtype and len(out) == len(a)
    result = torch.mm(a, b, out=out) if direct else a @ b
    if a2 is not None and b2 is not None:
        result.addmm_(a2, b2)
    return out if direct else out.copy_(result[: len(out)])


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows ``begin … end - 1`` of an expert, the ``index``-th piece ``of`` so many."""

    expert: int
    begin: int
    end: int
    index: int
    of: int

    def blocks(self, dtype: torch.dtype) -> list[slice]:
        """Runs of rows that are computed at a time."""
        step = _ROWS * 4 // dtype.itemsize
        return [slice(at, min(at + step, self.end)) for at in range(self.begin, self.end, step)]


def cut(counts: list[int], num_runs: int) -> list[list[Piece]]:
    """The rows of all experts in so many equal runs; at most ``num_runs - 1`` experts are cut."""
    ends = [sum(counts) * (i + 1) // num_runs for i in range(num_runs)]
    runs: list[list[Piece]] = [[] for _ in ends]
    begin = 0
    for expert, count in enumerate(counts):
        end = begin + count
        bounds = [begin, *(at for at in ends if begin < at < end), end]
        for index, (first, last) in enumerate(pairwise(bounds)):
            run = runs[min(bisect_right(ends, first), num_runs - 1)]
            run.append(Piece(expert, first, last, index, len(bounds) - 1))
        begin = end
    return runs


def _each(counts: list[int], work: Callable[[Piece], None]) -> None:
    """All pieces of all experts, a run a thread; where rows are few, by the caller alone."""
    threads = torch.get_num_threads()
    num_runs = min(max(_RUNS, threads), sum(counts) // _FEW)
    runs = cut(counts, max(1, num_runs))
    if num_runs < 2 or threads == 1:
        for piece in chain.from_iterable(runs):
            work(piece)
        return
    inference = torch.is_inference_mode_enabled()

    def elsewhere(run: list[Piece]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for piece in run:
                work(piece)

    list(_pool(threads).map(elsewhere, runs))  # raises what one of them did


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Workers whose operations use one thread each."""
    everyone = threading.Barrier(threads)

    def alone(_: int) -> None:
        torch.get_num_threads()  # else a thread's first operation sets its number to the newest of any thread
        torch.set_num_threads(1)
        everyone.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="expert")
    list(pool.map(alone, range(threads)))
    # The workers' setting was that of threads to come, too.
    torch.set_num_threads(threads)
    return pool
