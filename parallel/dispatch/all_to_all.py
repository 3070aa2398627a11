"""Experts spread over the ep axis: tokens travel to their experts by all-to-all, and the answers home again.

Each ep rank holds E_local neighbouring experts (of each class, where experts differ in shape). How tokens travel:

- without a capacity, once to each rank that has experts of their choice (:mod:`parallel.dispatch.visits`);
- with a capacity, once for every place of every expert, so that all sizes are known beforehand::

      T tokens ─spread→ rows by expert ═all-to-all═▶ rows by (source, local expert) ─regroup→ experts, and back

- with a budget for the rows that a rank receives at a time, once for each choice, in rounds
  (:mod:`parallel.dispatch.bounded`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import all_to_all_rows, exchange_counts, exchange_rows
from parallel.dispatch.base import TRIPS, Routing
from parallel.dispatch.bounded import run_in_rounds
from parallel.dispatch.local import answered, rows_of_experts
from parallel.dispatch.permute import Permutation, gather, plan, spread
from parallel.dispatch.rounds import Rounds, num_rounds
from parallel.dispatch.visits import Trip, Visits, return_home, row_bytes, visit
from parallel.exchange_check import ExchangeCheck, Notice
from parallel.exchange_timer import ExchangeTimer


class AllToAllDispatcher:
    """See :class:`parallel.dispatch.base.Dispatcher`.

    One device→host copy a layer without a capacity (all sizes at once), none with one.

    Args:
        group: the ep axis; ``E`` must be a multiple of its size.
        check: what the ranks do before each exchange; None: nothing.
        layer: index of the block, for what the check says.
        budget: most rows that a rank receives at a time; None: whatever comes.
        timer: told how long each exchange took; None: nobody asks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        check: ExchangeCheck | None = None,
        layer: int | None = None,
        budget: int | None = None,
        timer: ExchangeTimer | None = None,
    ) -> None:
        self.group, self.check, self.layer, self.budget = group, check, layer, budget
        self.timer = timer
        self.ep = dist.get_world_size(group)
        self.ep_rank = dist.get_rank(group)

    def at_layer(self, index: int) -> AllToAllDispatcher:
        return AllToAllDispatcher(self.group, self.check, index, self.budget, self.timer)

    def run(self, x_TD: Tensor, routing: Routing, experts: nn.Module) -> tuple[Tensor, Tensor]:
        place_TK = self._places(routing)
        if self.budget is not None:
            return self._in_rounds(x_TD, routing, place_TK, experts, self.budget)
        if routing.num_slots is not None:
            return self._by_place(x_TD, routing, place_TK, experts, routing.num_slots)
        return self._by_token(x_TD, routing, place_TK, experts)

    def _by_token(
        self, x_TD: Tensor, routing: Routing, place_TK: Tensor, experts: nn.Module
    ) -> tuple[Tensor, Tensor]:
        num_local = routing.num_experts // self.ep
        visits = Visits.plan(place_TK, self.ep, num_local)
        received = exchange_counts(visits.counts, self.group, self._notice("counts"), self.timer)
        num_rows, counts_E = received[:, 1:].sum(), received[:, 1:].sum(0)
        told = torch.cat([visits.counts[:, 0], received[:, 0], num_rows[None]]).tolist()
        send, recv = told[: self.ep], told[self.ep : -1]
        trip = Trip(visits, send, recv, self._swap, num_local)
        x_MD, weight_MK, expert_MK = visit(x_TD, routing.weight_TK, trip)
        home = Permutation.by_key(expert_MK, num_local, num_rows=told[-1])
        y_TD = return_home(answered(x_MD, weight_MK, home, counts_E, experts), trip)
        size = row_bytes(x_TD.shape[1], x_TD.dtype, visits.num_slots, routing.weight_TK.dtype)
        return y_TD, self._bytes(send, size, x_TD)

    def _by_place(
        self, x_TD: Tensor, routing: Routing, place_TK: Tensor, experts: nn.Module, num_slots: int
    ) -> tuple[Tensor, Tensor]:
        home, num_local = plan(routing, place_TK), routing.num_experts // self.ep
        splits = [num_local * num_slots] * self.ep
        there, back = self._notice("dispatch"), self._notice("combine")
        arrived = all_to_all_rows(spread(x_TD, home), splits, splits, self.group, there, self.timer)
        local = torch.arange(num_local, device=x_TD.device)
        regroup = Permutation.by_key(local.repeat_interleave(num_slots).repeat(self.ep)[:, None])
        answers = experts(spread(arrived, regroup), torch.full_like(local, num_slots * self.ep))
        inverse = Permutation(regroup.pair_of_row_N[:, None], regroup.row_of_pair_TK[:, 0])
        answers = all_to_all_rows(spread(answers, inverse), splits, splits, self.group, back, self.timer)
        y_TD = gather(answers, routing.weight_TK, home)
        return y_TD, self._bytes(splits, TRIPS * x_TD.shape[1] * x_TD.element_size(), x_TD)

    def _in_rounds(
        self, x_TD: Tensor, routing: Routing, place_TK: Tensor, experts: nn.Module, budget: int
    ) -> tuple[Tensor, Tensor]:
        home, counts = plan(routing, place_TK), rows_of_experts(routing, place_TK).view(self.ep, -1)
        received_SE, rows_SD = self._rows(routing, counts)
        rounds = num_rounds(int(rows_SD.sum(0).max()), budget)
        planned = Rounds.plan(home, rows_SD, self.ep_rank, rounds, received_SE)
        answers = run_in_rounds(x_TD, planned, self._swap, experts)
        y_TD = gather(answers, routing.weight_TK, home)
        trips = TRIPS if rounds == 1 else TRIPS + 1  # backward sends the rows a second time
        row = trips * x_TD.shape[1] * x_TD.element_size()
        return y_TD, self._bytes(rows_SD[self.ep_rank].tolist(), row, x_TD)

    def _rows(self, routing: Routing, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Rows to this rank's experts by source, on the device; of each (source, destination), on the CPU.

        All ranks must come to the same number of rounds, so each is told all counts, not only its own.
        """
        if routing.num_slots is not None:
            return counts, torch.full((self.ep, self.ep), counts.shape[1] * routing.num_slots)
        told = counts.view(1, -1).repeat(self.ep, 1)
        counts_SDE = exchange_counts(told, self.group, self._notice("counts"), self.timer)
        counts_SDE = counts_SDE.view(self.ep, *counts.shape)
        return counts_SDE[:, self.ep_rank], counts_SDE.sum(2).cpu()

    def _places(self, routing: Routing) -> Tensor:
        """Experts by number → experts by (ep rank, class, number); "nowhere" stays E."""
        sizes = routing.class_sizes
        if len(sizes) < 2:
            return routing.expert_TK
        classes = torch.arange(routing.num_experts).split(list(sizes))
        by_place = torch.cat([c.chunk(self.ep)[rank] for rank in range(self.ep) for c in classes])
        place_of_expert = torch.full((routing.num_experts + 1,), routing.num_experts)
        place_of_expert[by_place] = torch.arange(routing.num_experts)
        return place_of_expert.to(routing.expert_TK.device)[routing.expert_TK]

    def _bytes(self, send: list[int], row: int, like: Tensor) -> Tensor:
        sent = sum(send) - send[self.ep_rank]
        return torch.full((), sent * row, dtype=torch.int64, device=like.device)

    def _swap(
        self, rows: Tensor, send: list[int], recv: list[int], what: str, backward: bool = False
    ) -> Tensor:
        return exchange_rows(rows, send, recv, self.group, self._notice(what), self.timer, backward)

    def _notice(self, operation: str) -> Notice | None:
        return None if self.check is None else Notice(self.check, self.layer, operation)
