"""All experts on this rank: sort, run, sum back. The oracle every other dispatcher is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.dispatch.base import Dispatched, Routing
from parallel.dispatch.permute import Permutation, count, gather, plan, spread


class LocalDispatcher:
    """See :class:`parallel.dispatch.base.Dispatcher`."""

    def at_layer(self, index: int) -> LocalDispatcher:
        return self

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        permutation = plan(routing, routing.expert_TK)
        return Dispatched(
            rows_ND=spread(x_TD, permutation),
            counts_E=rows_of_experts(routing, routing.expert_TK),
            metadata=permutation,
            num_sent=torch.zeros((), dtype=torch.int64, device=x_TD.device),
        )

    def combine(self, rows_ND: Tensor, routing: Routing, metadata: object) -> Tensor:
        assert isinstance(metadata, Permutation)
        return gather(rows_ND, routing.weight_TK, metadata)


def rows_of_experts(routing: Routing, expert_TK: Tensor) -> Tensor:
    """Rows each of the E experts gets from this rank's tokens, int64 ``[E]`` (see :func:`.permute.plan`)."""
    if routing.num_slots is None:
        return count(expert_TK, routing.num_experts + 1)[: routing.num_experts]
    return torch.full(
        (routing.num_experts,), routing.num_slots, dtype=torch.int64, device=routing.expert_TK.device
    )
