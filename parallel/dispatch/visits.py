"""A token travels once to each rank that has experts of its choice, with what these are to do.

    T tokens ─take→ N visits ═all-to-all═▶ M visitors ─experts here, weighted and summed→ M partial sums
    T tokens ◀─────────────sum──────────── N partial sums ◀═all-to-all═══════════════════┘

With K choices on few ranks that is up to K times fewer bytes than a row a choice (DeepSeek-V3 does so between
nodes, arXiv:2412.19437, section 3.2.2). Combine weights and local experts ride in the token's row, the gradients of
weights in that of its gradient: two exchanges forward and two backward, as without.

Shape suffixes: T tokens on this rank, K choices a token, D ranks of the group, N visits of this rank's tokens (one
a token and rank), M visits to this rank, W model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.dispatch.permute import count, take, weighted_sum
from parallel.recompute import recorded

Swap = Callable[[Tensor, list[int], list[int], str, bool], Tensor]
"""``(rows, send, recv, what, backward)``: all-to-all of rows."""


@dataclass(frozen=True)
class Visits:
    """Where this rank's tokens go. Visits are sorted by rank, then token; all on the device.

    Attributes:
        token_P: token of each visit, in at least N places.
        row_TK: visit that each choice is part of, -1 where it goes nowhere.
        slot_TK: its number among the choices of that visit.
        row_TR: the visits of each token, -1 for less than the R = min(K, D) it can make.
        local_TK: expert of each choice, as its rank numbers them.
        counts: visits to each rank, and choices of each of its experts, int64 ``[D, 1 + local experts]``.
    """

    token_P: Tensor
    row_TK: Tensor
    slot_TK: Tensor
    row_TR: Tensor
    local_TK: Tensor
    counts: Tensor

    @classmethod
    def plan(cls, place_TK: Tensor, num_ranks: int, num_local: int) -> Visits:
        """From experts by place: rank · ``num_local`` + local expert; larger: nowhere. No host sync."""
        num_tokens, num_choices = place_TK.shape
        rank_TK = torch.div(place_TK, num_local, rounding_mode="floor").clamp_max_(num_ranks)
        same_TKK = rank_TK[:, :, None] == rank_TK[:, None, :]
        slot_TK = same_TKK.tril_(-1).sum(-1)
        here_TK = rank_TK < num_ranks
        goes_TD = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.int64, device=place_TK.device)
        goes_TD = goes_TD.scatter_(1, rank_TK, 1)[:, :num_ranks]
        row_TD = (goes_TD.t().flatten().cumsum(0) - 1).view(num_ranks, num_tokens).t()
        row_TK = row_TD.gather(1, rank_TK.clamp_max(num_ranks - 1)).masked_fill_(~here_TK, -1)
        first_TK = row_TK.masked_fill(slot_TK > 0, -1)
        most = min(num_choices, num_ranks)
        token_TK = torch.arange(num_tokens, device=place_TK.device)[:, None].expand_as(place_TK)
        token_P = place_TK.new_zeros(
            num_tokens * most + 1
        )  # the last one: choices that are no visit of their own
        token_P.scatter_(
            0, torch.where(first_TK < 0, len(token_P) - 1, first_TK).flatten(), token_TK.flatten()
        )
        choices = count(place_TK, num_ranks * num_local + 1)[:-1].view(num_ranks, num_local)
        return cls(
            token_P=token_P,
            row_TK=row_TK,
            slot_TK=slot_TK,
            row_TR=first_TK.sort(1, descending=True).values[:, :most].contiguous(),
            local_TK=place_TK.remainder(num_local),
            counts=torch.cat([goes_TD.sum(0)[:, None], choices], 1),
        )

    @property
    def num_slots(self) -> int:
        """K: all choices of a token may be on one rank."""
        return self.row_TK.shape[1]

    def cell_TK(self) -> Tensor:
        """Place of each choice in a table ``[N, K]``, flat; -1 where it goes nowhere."""
        return torch.where(self.row_TK < 0, -1, self.row_TK * self.num_slots + self.slot_TK)

    def table(self, value_TK: Tensor, num_visits: int, nothing: float) -> Tensor:
        """What choices have, by visit ``[N, K]``; ``nothing`` where there is no choice."""
        size, cell_TK = num_visits * self.num_slots, self.cell_TK()
        flat = value_TK.new_full((size + 1,), nothing)
        flat.scatter_(0, torch.where(cell_TK < 0, size, cell_TK).flatten(), value_TK.flatten())
        return flat[:size].view(num_visits, self.num_slots)


@dataclass(frozen=True)
class Trip:
    """One exchange of visits, as one rank sees it.

    Attributes:
        send, recv: visits to and from each rank.
        nowhere: the local expert of a slot without a choice.
    """

    visits: Visits
    send: list[int]
    recv: list[int]
    swap: Swap
    nowhere: int

    @property
    def token_N(self) -> Tensor:
        """Token of each visit."""
        return self.visits.token_P[: sum(self.send)]


def row_bytes(width: int, dtype: torch.dtype, num_slots: int, weight_dtype: torch.dtype) -> int:
    """Bytes that one visit takes: there and back, forward and backward."""
    there, home = _Row(width, dtype, num_slots, weight_dtype, True), width * dtype.itemsize
    return there.size + home + home + _Row(width, dtype, num_slots, weight_dtype, False).size


def visit(x_TW: Tensor, weight_TK: Tensor, trip: Trip) -> tuple[Tensor, Tensor, Tensor]:
    """Send tokens with weights and local experts; gradients of tokens and weights come home. Collective.

    Returns:
        Visitors ``[M, W]`` (rows may have gaps between them), their weights ``[M, K]`` and local experts
        ``[M, K]``, int64, ``trip.nowhere`` in empty slots.
    """
    return _Visit.apply(x_TW, weight_TK, trip)


def return_home(sum_MW: Tensor, trip: Trip) -> Tensor:
    """Send partial sums home and add up each token's: ``[M, W] → [T, W]``. Collective."""
    return _ReturnHome.apply(sum_MW, trip)


class _Row:
    """What lies where in a row of bytes: token, weights, and where they go along, local experts (int32)."""

    def __init__(
        self, width: int, dtype: torch.dtype, num_slots: int, weight_dtype: torch.dtype, experts: bool
    ) -> None:
        self._width, self._dtype, self._num_slots, self._weight_dtype = width, dtype, num_slots, weight_dtype
        self._weights = _aligned(width * dtype.itemsize)
        self._experts = self._weights + num_slots * weight_dtype.itemsize
        self.size = _aligned(self._experts + (num_slots * 4 if experts else 0))

    def empty(self, num_rows: int, device: torch.device) -> Tensor:
        return torch.empty(num_rows, self.size, dtype=torch.uint8, device=device)

    def tokens(self, rows: Tensor) -> Tensor:
        """A view, as are the others."""
        return _part(rows, 0, self._width, self._dtype)

    def weights(self, rows: Tensor) -> Tensor:
        return _part(rows, self._weights, self._num_slots, self._weight_dtype)

    def experts(self, rows: Tensor) -> Tensor:
        return _part(rows, self._experts, self._num_slots, torch.int32)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8


def _part(rows: Tensor, begin: int, num: int, dtype: torch.dtype) -> Tensor:
    return rows[:, begin : begin + num * dtype.itemsize].view(dtype)


class _Visit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, weight_TK: Tensor, trip: Trip) -> tuple[Tensor, Tensor, Tensor]:
        visits, num_visits = trip.visits, sum(trip.send)
        kinds = x_TW.shape[1], x_TW.dtype, visits.num_slots, weight_TK.dtype
        row = _Row(*kinds, experts=True)
        ctx.trip, ctx.row = trip, _Row(*kinds, experts=False)

        def exchange() -> Tensor:
            rows = row.empty(num_visits, x_TW.device)
            torch.index_select(x_TW, 0, trip.token_N, out=row.tokens(rows))
            row.weights(rows).copy_(visits.table(weight_TK, num_visits, 0.0))
            row.experts(rows).copy_(visits.table(visits.local_TK, num_visits, trip.nowhere))
            return trip.swap(rows, trip.send, trip.recv, "dispatch", False)

        arrived = recorded(exchange)
        expert_MK = row.experts(arrived).long()
        ctx.mark_non_differentiable(expert_MK)
        return row.tokens(arrived), row.weights(arrived).contiguous(), expert_MK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        trip: Trip = ctx.trip
        row: _Row = ctx.row
        grad_MW, grad_MK, _ = grads
        rows = row.empty(len(grad_MW), grad_MW.device)
        row.tokens(rows).copy_(grad_MW)
        row.weights(rows).copy_(grad_MK)
        home = trip.swap(rows, trip.recv, trip.send, "dispatch", True)
        grad_x = weighted_sum(row.tokens(home), trip.visits.row_TR, None, gaps=True)
        cell_TK = trip.visits.cell_TK()
        grad_weight = take(row.weights(home).flatten(), cell_TK.flatten(), gaps=True)
        return grad_x, grad_weight.view(cell_TK.shape), None


class _ReturnHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sum_MW: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        home = recorded(lambda: trip.swap(sum_MW, trip.recv, trip.send, "combine", False))
        return weighted_sum(home, trip.visits.row_TR, None, gaps=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        trip: Trip = ctx.trip
        return trip.swap(grads[0].index_select(0, trip.token_N), trip.send, trip.recv, "combine", True), None
