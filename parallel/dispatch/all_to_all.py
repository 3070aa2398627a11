"""Experts spread over the ep axis: rows travel to their experts by all-to-all, and home again.

    T tokens ─spread→ rows by global expert ═all-to-all═▶ rows by (source, local expert)
                                                             │ regroup by local expert
    T tokens ◀gather─ rows by global expert ◀═all-to-all═ rows by (source, local expert)

Each ep rank holds E_local neighbouring experts (of each class, where experts differ in shape), so rows sorted by
the experts' places are sorted by destination. Combine weights stay at home: answers are weighted where the token
lives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import all_to_all_rows, exchange_counts, exchange_rows
from parallel.dispatch.base import TRIPS, Dispatched, Routing
from parallel.dispatch.bounded import run_in_rounds
from parallel.dispatch.local import rows_of_experts
from parallel.dispatch.permute import Permutation, gather, plan, spread
from parallel.dispatch.rounds import Rounds, num_rounds
from parallel.exchange_check import ExchangeCheck, Notice
from parallel.exchange_timer import ExchangeTimer


@dataclass(frozen=True)
class _Metadata:
    home: Permutation
    regroup: Permutation
    send_splits: list[int]
    recv_splits: list[int]


@dataclass(frozen=True)
class _Sizes:
    """How many rows go where.

    Attributes:
        send, recv: to and from each rank.
        received_SE: of each (source, local expert), on the device.
        rows_SD: from each rank to each, the same on all of them, on the CPU; None where nobody asks.
    """

    send: list[int]
    recv: list[int]
    received_SE: Tensor
    rows_SD: Tensor | None = None


class AllToAllDispatcher:
    """See :class:`parallel.dispatch.base.Dispatcher`.

    One device→host copy a layer in dropless mode (all splits at once), none with a capacity, where every split is
    known beforehand.

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

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        home, counts = self._home(routing)
        rows = spread(x_TD, home)  # at work while the host waits for the sizes
        return self._send(rows, routing, home, self._sizes(routing, counts))

    def combine(self, rows_ND: Tensor, routing: Routing, metadata: object) -> Tensor:
        assert isinstance(metadata, _Metadata)
        regroup = metadata.regroup
        inverse = Permutation(regroup.pair_of_row_N[:, None], regroup.row_of_pair_TK[:, 0], partial=False)
        answers = spread(rows_ND, inverse)
        send, recv = metadata.recv_splits, metadata.send_splits
        returned = all_to_all_rows(answers, send, recv, self.group, self._notice("combine"), self.timer)
        return gather(returned, routing.weight_TK, metadata.home)

    def run(self, x_TD: Tensor, routing: Routing, experts: nn.Module) -> tuple[Tensor, Tensor]:
        if self.budget is None:
            sent = self.dispatch(x_TD, routing)
            rows = experts(sent.rows_ND, sent.counts_E)
            return self.combine(rows, routing, sent.metadata), sent.num_trips
        home, counts = self._home(routing)
        sizes = self._sizes(routing, counts)
        assert sizes.rows_SD is not None
        rounds = num_rounds(int(sizes.rows_SD.sum(0).max()), self.budget)
        planned = Rounds.plan(home, sizes.rows_SD, self.ep_rank, rounds, sizes.received_SE)
        answers = run_in_rounds(x_TD, planned, self._swap, experts)
        trips = TRIPS if rounds == 1 else TRIPS + 1  # backward sends the rows a second time
        return gather(answers, routing.weight_TK, home), self._num_sent(sizes) * trips

    def _home(self, routing: Routing) -> tuple[Permutation, Tensor]:
        """This rank's rows in order of destination, and how many go to each ``[destination, local expert]``."""
        place_TK = self._places(routing)
        return plan(routing, place_TK), rows_of_experts(routing, place_TK).view(self.ep, -1)

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

    def _sizes(self, routing: Routing, counts: Tensor) -> _Sizes:
        if routing.num_slots is not None:
            splits = [counts.shape[1] * routing.num_slots] * self.ep
            rows_SD = None if self.budget is None else torch.tensor([splits] * self.ep)
            return _Sizes(splits, splits, counts, rows_SD)
        if self.budget is None:
            # [source, local expert]
            received = exchange_counts(counts, self.group, self._notice("counts"), self.timer)
            send, recv = torch.stack([counts.sum(1), received.sum(1)]).tolist()
            return _Sizes(send, recv, received)
        # All ranks must come to the same number of rounds, so each is told all counts, not only its own.
        told = counts.view(1, -1).repeat(self.ep, 1)
        counts_SDE = exchange_counts(told, self.group, self._notice("counts"), self.timer)
        counts_SDE = counts_SDE.view(self.ep, *counts.shape)
        rows_SD = counts_SDE.sum(2).cpu()
        send, recv = rows_SD[self.ep_rank].tolist(), rows_SD[:, self.ep_rank].tolist()
        return _Sizes(send, recv, counts_SDE[:, self.ep_rank], rows_SD)

    def _send(self, rows: Tensor, routing: Routing, home: Permutation, sizes: _Sizes) -> Dispatched:
        num_local = sizes.received_SE.shape[1]
        if routing.num_slots is None:
            expert_of_row = torch.repeat_interleave(
                torch.arange(num_local, device=rows.device).repeat(self.ep),
                sizes.received_SE.flatten(),
                output_size=sum(sizes.recv),
            )
        else:
            expert_of_row = torch.arange(num_local, device=rows.device)
            expert_of_row = expert_of_row.repeat_interleave(routing.num_slots).repeat(self.ep)
        regroup = Permutation.by_key(expert_of_row[:, None])
        notice = self._notice("dispatch")
        arrived = all_to_all_rows(rows, sizes.send, sizes.recv, self.group, notice, self.timer)
        return Dispatched(
            rows_ND=spread(arrived, regroup),
            counts_E=sizes.received_SE.sum(0),
            metadata=_Metadata(home, regroup, sizes.send, sizes.recv),
            num_trips=self._num_sent(sizes) * TRIPS,
        )

    def _num_sent(self, sizes: _Sizes) -> Tensor:
        sent = sum(sizes.send) - sizes.send[self.ep_rank]
        return torch.full((), sent, dtype=torch.int64, device=sizes.received_SE.device)

    def _swap(self, rows: Tensor, send: list[int], recv: list[int], what: str) -> Tensor:
        return exchange_rows(rows, send, recv, self.group, self._notice(what), self.timer)

    def _notice(self, operation: str) -> Notice | None:
        return None if self.check is None else Notice(self.check, self.layer, operation)
