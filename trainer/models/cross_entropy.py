"""The head and its loss in one: logits are made for a few rows at a time and never stand there as a whole.

A row's gradient is known as soon as its logits are, so it is taken in the same pass: what is kept for backward is
as large as the input and the weight, and no product is computed twice (Liger Kernel, arXiv:2410.10989, section 3).

Shape suffixes: N rows, D model width, V words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.data.batch import IGNORED

_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Of the fp32 logits of a chunk: on a CPU they stay in its cache, on a GPU they fill it."""

_ROWS = 128
"""Of a chunk, at least: products of fewer are slow."""


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """``Σ −log softmax(x Wᵀ)[target]`` over the rows whose target is not ``IGNORED``: nats, fp32, 0-dim.

    Logits have the input's dtype, softmax and sums fp32.

    Args:
        weight_VD: of the input's dtype.
        targets_N: int64.
    """
    found: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, torch.is_grad_enabled())
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, wanted: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = torch.empty_like(x) if wanted and ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if wanted and ctx.needs_input_grad[1] else None
        losses = x.new_empty(len(x), dtype=wide)
        num_rows = max(_ROWS, _BYTES[x.device.type] // (4 * len(weight)))
        for start in range(0, len(x), num_rows):
            chunk = slice(start, start + num_rows)
            ignored = targets[chunk, None] == IGNORED
            rows, target = x[chunk].masked_fill(ignored, 0), targets[chunk, None].masked_fill(ignored, 0)
            logits = F.linear(rows, weight).to(wide)
            p = logits.softmax(1)
            # The largest p is 1 / Σ exp(logit - largest): with it log p is exact where p itself is 0.
            top = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
            losses[chunk] = (top - logits.gather(1, target)).masked_fill_(ignored, 0).squeeze(1)
            if dx is None and dweight is None:
                continue
            p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
            dlogits = p.to(x.dtype)
            if dx is not None:
                torch.mm(dlogits, weight, out=dx[chunk]).masked_fill_(ignored, 0)
            if dweight is not None:
                _add_product(dweight, dlogits.t(), rows)
        ctx.save_for_backward(dx, dweight)
        ctx.dtype = x.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        # In the width of sums: in half of the bits the factor itself would be off by a part in 500.
        scaled = [None if d is None else (d.to(dloss.dtype) * dloss).to(ctx.dtype) for d in (dx, dweight)]
        return *scaled, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
