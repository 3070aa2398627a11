"""Moving rows between token order and expert order, forward and backward as gathers only.

Gathers (and sums over the fixed K choices) have one order of additions: the same bits each time, on every
device, which a scatter with atomics does not give.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.dispatch.base import Routing


@dataclass(frozen=True)
class Permutation:
    """Which row a pair becomes, and which pair a row came from.

    Attributes:
        row_of_pair_TK: row of each pair, -1 where the pair is dropped.
        pair_of_row_N: pair of each row, -1 where the row is empty.
        drops, gaps: whether there may be a -1 among the former, and among the latter.
    """

    row_of_pair_TK: Tensor
    pair_of_row_N: Tensor
    drops: bool = False
    gaps: bool = False

    @classmethod
    def by_key(cls, key_TK: Tensor, num_keys: int | None = None, num_rows: int | None = None) -> Permutation:
        """Rows sorted by an integer key, pairs of equal key in their order.

        Every pair gets a row, or with ``num_keys`` those of smaller keys only; ``num_rows``: how many these are
        (None: a host sync).
        """
        pair_of_row = torch.argsort(key_TK.flatten(), stable=True)
        row_of_pair = torch.empty_like(pair_of_row)
        row_of_pair[pair_of_row] = torch.arange(pair_of_row.numel(), device=key_TK.device)
        row_of_pair = row_of_pair.view(key_TK.shape)
        if num_keys is None:
            return cls(row_of_pair, pair_of_row)
        here = key_TK < num_keys
        num_rows = int(here.sum()) if num_rows is None else num_rows
        return cls(row_of_pair.masked_fill(~here, -1), pair_of_row[:num_rows], drops=True)

    @classmethod
    def by_row(cls, row_of_pair_TK: Tensor, num_rows: int) -> Permutation:
        """Given rows (-1: dropped) in a table of ``num_rows``; static shapes, so no host sync."""
        flat = row_of_pair_TK.flatten()
        pair_of_row = torch.full((num_rows + 1,), -1, dtype=flat.dtype, device=flat.device)
        pair_of_row[torch.where(flat < 0, num_rows, flat)] = torch.arange(flat.numel(), device=flat.device)
        return cls(row_of_pair_TK, pair_of_row[:num_rows], drops=True, gaps=True)

    @property
    def num_choices(self) -> int:
        return self.row_of_pair_TK.shape[1]

    @property
    def token_of_row_N(self) -> Tensor:
        """Token of each row, -1 where the row is empty."""
        return torch.div(self.pair_of_row_N, self.num_choices, rounding_mode="floor")

    def split(self, num_rows: list[int]) -> list[Permutation]:
        """One for each run of so many rows; pairs of the others are dropped in it."""
        ends, parts = list(accumulate(num_rows)), self.pair_of_row_N.split(num_rows)
        rows = self.row_of_pair_TK
        own = [
            torch.where((rows >= end - num) & (rows < end), rows - (end - num), -1)
            for end, num in zip(ends, num_rows, strict=True)
        ]
        return [Permutation(*pair, drops=True, gaps=self.gaps) for pair in zip(own, parts, strict=True)]


def take(x: Tensor, index: Tensor, gaps: bool) -> Tensor:
    """``x[index]``, with ``gaps`` zeros where index is -1."""
    if not gaps:
        return x.index_select(0, index)
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    valid = (index >= 0).view(-1, *[1] * (x.dim() - 1))
    return x.index_select(0, index.clamp_min(0)).masked_fill(~valid, 0)


def weighted_sum(rows_ND: Tensor, index_TK: Tensor, weight_TK: Tensor | None, gaps: bool) -> Tensor:
    """``out[t] = Σ_k weight[t, k] · rows[index[t, k]]``, accumulated in fp32 (or wider).

    Args:
        gaps: whether an index may be -1: of no row.
    """
    num_tokens, num_choices = index_TK.shape
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
    if gaps:
        kept = index_TK >= 0
        weight_TK = kept.to(rows_ND.dtype) if weight_TK is None else weight_TK * kept
        index_TK = index_TK.clamp_min(0)
    if rows_ND.dtype == torch.float32 and num_choices > 1:
        # A fused gather and sum: no [T, K, D] in between.
        weights = None if weight_TK is None else weight_TK.to(torch.float32)
        return F.embedding_bag(index_TK, rows_ND, per_sample_weights=weights, mode="sum")
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    out: Tensor | None = None
    for k in range(num_choices):
        picked = rows_ND.index_select(0, index_TK[:, k]).to(wide)
        if weight_TK is not None:
            picked *= weight_TK[:, k, None]
        out = picked if out is None else out.add_(picked)
    assert out is not None, "at least one choice"
    return out.to(rows_ND.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return take(x_TD, permutation.token_of_row_N, permutation.gaps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        p: Permutation = ctx.permutation
        return weighted_sum(grads[0], p.row_of_pair_TK, None, p.drops), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        ctx.save_for_backward(rows_ND, weight_TK)
        return weighted_sum(rows_ND, permutation.row_of_pair_TK, weight_TK, permutation.drops)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        p: Permutation = ctx.permutation
        rows_ND, weight_TK = ctx.saved_tensors
        grad_ND = take(grads[0], p.token_of_row_N, p.gaps)
        dot_N = (grad_ND.to(weight_TK.dtype) * rows_ND.to(weight_TK.dtype)).sum(-1)
        grad_weight = take(dot_N, p.row_of_pair_TK.flatten(), p.drops).view_as(weight_TK)
        weight_N = take(weight_TK.flatten(), p.pair_of_row_N, p.gaps)
        return (grad_ND * weight_N[:, None]).to(rows_ND.dtype), grad_weight, None


def spread(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Copy each token to the rows of its pairs: ``[T, D] → [N, D]``; empty rows are zero."""
    return _Spread.apply(x_TD, permutation)


def gather(rows_ND: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
    """Weighted sum of each token's rows: ``[N, D] → [T, D]``; a dropped pair adds nothing."""
    return _Gather.apply(rows_ND, weight_TK, permutation)


def plan(routing: Routing, expert_TK: Tensor) -> Permutation:
    """The permutation that groups pairs by expert (or puts them into the experts' fixed slots).

    Args:
        expert_TK: ``routing.expert_TK``, or the experts' places in an order of the dispatcher's own.
    """
    slot_TK, num_slots, num_experts = routing.slot_TK, routing.num_slots, routing.num_experts
    if slot_TK is None:
        return Permutation.by_key(expert_TK, num_experts if routing.partial else None)
    assert num_slots is not None
    row_TK = torch.where(slot_TK < 0, slot_TK, expert_TK * num_slots + slot_TK)
    return Permutation.by_row(row_TK, num_experts * num_slots)


def count(index: Tensor, num_bins: int) -> Tensor:
    """How often each of ``0 … num_bins - 1`` occurs, int64 (bincount without its host sync)."""
    flat = index.flatten()
    zeros = torch.zeros(num_bins, dtype=torch.int64, device=flat.device)
    return zeros.scatter_add_(0, flat, torch.ones_like(flat))
