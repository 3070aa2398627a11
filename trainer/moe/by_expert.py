"""Gated experts on a CPU: an expert a thread, a block of rows at a time, little kept for backward.

    forward     h = silu(x w1) ∘ (x w3)        y = weight · (h w2)
    backward    dh = dy w2ᵀ                    dweight = ⟨dh, h⟩ (so y need not be kept: SonicMoE, arXiv:2512.14080)

Kept are x and the two projections; h is computed again, which costs one pass where keeping it costs memory. What a
block of rows needs in between stays in a core's cache. A matrix product is computed by one thread where the experts
are many enough to give each thread some: it never waits for another, and its bits do not depend on their number.
Narrow types are multiplied in fp32, an expert's weights at a time, on processors that would have to take them apart
(bf16 without AVX512-BF16 or AMX: a third of fp32's speed); between products all is at least fp32.

Shape suffixes: N rows, E experts, D model width, F expert width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 512
"""Of a block, a thread: 256 to 1024 are alike, fewer cost more calls."""

_silu_backward_into = torch.ops.aten.silu_backward.grad_input

Work = Callable[[int, list[slice]], None]
"""Given an expert and the blocks of its rows."""


def swiglu_by_expert(
    rows_ND: Tensor,
    counts: list[int],
    w1_EDF: Tensor,
    w3_EDF: Tensor,
    w2_EFD: Tensor,
    weight_N: Tensor | None = None,
) -> Tensor:
    """``weight · (silu(x w1) ∘ (x w3)) w2`` of rows sorted by expert, ``[N, D]``.

    Args:
        rows_ND: on the CPU, of any floating type.
        counts: rows of each expert; they sum to N.
        w1_EDF, w3_EDF, w2_EFD: of the rows' type.
        weight_N: fp32 or wider; None: 1.
    """
    return _ByExpert.apply(rows_ND, w1_EDF, w3_EDF, w2_EFD, weight_N, counts)


class _ByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weight: Tensor | None, counts: list[int]
    ) -> Tensor:
        gate = rows.new_empty(rows.shape[0], w1.shape[2])
        up, out = torch.empty_like(gate), torch.empty_like(rows)
        factors, wide = _factors(rows.dtype), _wide(rows.dtype)

        def expert(e: int, blocks: list[slice]) -> None:
            own1, own3, own2 = (w[e].to(factors) for w in (w1, w3, w2))
            for block in blocks:
                x = rows[block].to(factors)
                g, u = _product(x, own1, gate[block]).to(wide), _product(x, own3, up[block])
                h = F.silu(g).mul_(u)
                if weight is not None:
                    h.mul_(weight[block, None])
                _product(h.to(factors), own2, out[block])

        _each(counts, expert)
        ctx.counts = counts
        ctx.save_for_backward(rows, gate, up, w1, w3, w2, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, w1, w3, w2, weight = ctx.saved_tensors
        factors, wide = _factors(rows.dtype), _wide(rows.dtype)
        drows, *dws = (torch.empty_like(x) for x in (rows, w1, w3, w2))
        dweight = None if weight is None else torch.empty_like(weight)

        def expert(e: int, blocks: list[slice]) -> None:
            own1, own3, own2 = (w[e].to(factors).t() for w in (w1, w3, w2))  # [F, D], [F, D], [D, F]
            sums = [dw[e].zero_() if dw.dtype == wide else torch.zeros_like(dw[e], dtype=wide) for dw in dws]
            for block in blocks:
                x, dy = rows[block].to(factors), dout[block].to(factors)
                g, u = gate[block].to(wide), up[block].to(wide)
                a = F.silu(g)
                h, dh = a * u, (dy @ own2).to(wide)
                if weight is not None and dweight is not None:
                    dweight[block] = torch.linalg.vecdot(dh, h)
                    dh.mul_(weight[block, None])
                    dy = (dy * weight[block, None]).to(factors)
                _add_product(sums[2], h.to(factors).t(), dy)
                du = torch.mul(dh, a, out=a).to(factors)
                dg = _silu_backward_into(dh.mul_(u), g, grad_input=h).to(factors)
                _add_product(sums[0], x.t(), dg)
                _add_product(sums[1], x.t(), du)
                _product(dg, own1, drows[block], du, own3)
            for dw, total in zip(dws, sums, strict=True):
                dw[e].copy_(total)

        _each(ctx.counts, expert)
        return drows, *dws, dweight, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@cache
def _factors(dtype: torch.dtype) -> torch.dtype:
    """The type in which matrices are multiplied."""
    if dtype == torch.bfloat16 and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return dtype
    return _wide(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _product(a: Tensor, b: Tensor, out: Tensor, a2: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """``a b (+ a2 b2)``, also put into ``out``, which may be narrower."""
    result = torch.mm(a, b, out=out) if out.dtype == a.dtype else a @ b
    if a2 is not None and b2 is not None:
        result.addmm_(a2, b2)
    if result is not out:
        out.copy_(result)
    return result


def _each(counts: list[int], work: Work) -> None:
    """All experts, the ones with most rows first: one a thread, unless one has more rows than a thread's share."""
    threads, total = torch.get_num_threads(), sum(counts)
    together = 4 * max(counts) * threads <= 5 * total
    step = _ROWS if together else _ROWS * threads
    begins = [0, *accumulate(counts)]

    def one(e: int) -> None:
        work(e, [slice(at, min(at + step, begins[e + 1])) for at in range(begins[e], begins[e + 1], step)])

    order = sorted(range(len(counts)), key=lambda e: -counts[e])
    if threads == 1 or not together:
        for e in order:
            one(e)
        return
    inference = torch.is_inference_mode_enabled()

    def elsewhere(e: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            one(e)

    list(_pool(threads).map(elsewhere, order))


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
