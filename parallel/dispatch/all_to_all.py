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
from torch import Tensor

from parallel.collectives import all_to_all_rows, exchange_counts
from parallel.dispatch.base import Dispatched, Routing
from parallel.dispatch.local import rows_of_experts
from parallel.dispatch.permute import Permutation, gather, plan, spread
from parallel.exchange_check import ExchangeCheck, Notice


@dataclass(frozen=True)
class _Metadata:
    home: Permutation
    regroup: Permutation
    send_splits: list[int]
    recv_splits: list[int]


class AllToAllDispatcher:
    """See :class:`parallel.dispatch.base.Dispatcher`.

    One device→host copy a layer in dropless mode (both split lists at once), none with a capacity, where
    every split is known beforehand.

    Args:
        group: the ep axis; ``E`` must be a multiple of its size.
        check: what the ranks do before each exchange; None: nothing.
        layer: index of the block, for what the check says.
    """

    def __init__(
        self, group: dist.ProcessGroup, check: ExchangeCheck | None = None, layer: int | None = None
    ) -> None:
        self.group, self.check = group, check
        self.ep = dist.get_world_size(group)
        self.ep_rank = dist.get_rank(group)
        self._counts, self._dispatch, self._combine = (
            None if check is None else Notice(check, layer, operation)
            for operation in ("counts", "dispatch", "combine")
        )

    def at_layer(self, index: int) -> AllToAllDispatcher:
        return AllToAllDispatcher(self.group, self.check, index)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        place_TK = self._places(routing)
        home = plan(routing, place_TK)
        counts = rows_of_experts(routing, place_TK).view(self.ep, -1)  # [destination, local expert]
        num_local = counts.shape[1]
        rows = spread(x_TD, home)
        if routing.num_slots is None:
            received = exchange_counts(counts, self.group, self._counts)  # [source, local expert]
            send_splits, recv_splits = torch.stack([counts.sum(1), received.sum(1)]).tolist()
            expert_of_row = torch.repeat_interleave(
                torch.arange(num_local, device=rows.device).repeat(self.ep),
                received.flatten(),
                output_size=sum(recv_splits),
            )
        else:
            received = counts
            send_splits = recv_splits = [num_local * routing.num_slots] * self.ep
            expert_of_row = torch.arange(num_local, device=rows.device)
            expert_of_row = expert_of_row.repeat_interleave(routing.num_slots).repeat(self.ep)
        regroup = Permutation.by_key(expert_of_row[:, None])
        arrived = all_to_all_rows(rows, send_splits, recv_splits, self.group, self._dispatch)
        num_sent = sum(send_splits) - send_splits[self.ep_rank]
        return Dispatched(
            rows_ND=spread(arrived, regroup),
            counts_E=received.sum(0),
            metadata=_Metadata(home, regroup, send_splits, recv_splits),
            num_sent=torch.full((), num_sent, dtype=torch.int64, device=rows.device),
        )

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

    def combine(self, rows_ND: Tensor, routing: Routing, metadata: object) -> Tensor:
        assert isinstance(metadata, _Metadata)
        regroup = metadata.regroup
        inverse = Permutation(regroup.pair_of_row_N[:, None], regroup.row_of_pair_TK[:, 0], partial=False)
        answers = spread(rows_ND, inverse)
        returned = all_to_all_rows(
            answers, metadata.recv_splits, metadata.send_splits, self.group, self._combine
        )
        return gather(returned, routing.weight_TK, metadata.home)
