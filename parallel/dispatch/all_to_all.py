"""Experts spread over the ep axis: rows travel to their experts by all-to-all, and home again.

    T tokens ─spread→ rows by global expert ═all-to-all═▶ rows by (source, local expert)
                                                             │ regroup by local expert
    T tokens ◀gather─ rows by global expert ◀═all-to-all═ rows by (source, local expert)

Global expert e lives on ep rank ``e // E_local``, so rows sorted by expert are sorted by destination.
Combine weights stay at home: answers are weighted where the token lives.
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
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ep = dist.get_world_size(group)
        self.ep_rank = dist.get_rank(group)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        home = plan(routing.expert_TK, routing.slot_TK, routing.num_slots, routing.num_experts)
        counts = rows_of_experts(routing).view(self.ep, -1)  # [destination, local expert]
        num_local = counts.shape[1]
        rows = spread(x_TD, home)
        if routing.num_slots is None:
            received = exchange_counts(counts, self.group)  # [source, local expert]
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
        arrived = all_to_all_rows(rows, send_splits, recv_splits, self.group)
        num_sent = sum(send_splits) - send_splits[self.ep_rank]
        return Dispatched(
            rows_ND=spread(arrived, regroup),
            counts_E=received.sum(0),
            metadata=_Metadata(home, regroup, send_splits, recv_splits),
            num_sent=torch.full((), num_sent, dtype=torch.int64, device=rows.device),
        )

    def combine(self, rows_ND: Tensor, routing: Routing, metadata: object) -> Tensor:
        assert isinstance(metadata, _Metadata)
        regroup = metadata.regroup
        inverse = Permutation(regroup.pair_of_row_N[:, None], regroup.row_of_pair_TK[:, 0], partial=False)
        returned = all_to_all_rows(
            spread(rows_ND, inverse), metadata.recv_splits, metadata.send_splits, self.group
        )
        return gather(returned, routing.weight_TK, metadata.home)
