"""All experts on this rank: sort, run, sum back. The oracle every other dispatcher is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.dispatch.base import Routing
from parallel.dispatch.bounded import run_in_rounds
from parallel.dispatch.permute import Permutation, count, gather, plan, spread
from parallel.dispatch.rounds import Rounds, num_rounds


class LocalDispatcher:
    """See :class:`parallel.dispatch.base.Dispatcher`.

    Args:
        budget: most rows that the experts are given at a time; None: all at once.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget

    def at_layer(self, index: int) -> LocalDispatcher:
        return self

    def run(self, x_TD: Tensor, routing: Routing, experts: nn.Module) -> tuple[Tensor, Tensor]:
        home = plan(routing, routing.expert_TK)
        counts_E = rows_of_experts(routing, routing.expert_TK)
        none = torch.zeros((), dtype=torch.int64, device=x_TD.device)
        num_rows = home.pair_of_row_N.shape[0]
        if self.budget is not None:
            rounds = num_rounds(num_rows, self.budget)
            planned = Rounds.plan(home, torch.tensor([[num_rows]]), 0, rounds, counts_E[None])
            answers = run_in_rounds(x_TD, planned, _stay, experts)
            return gather(answers, routing.weight_TK, home), none
        return answered(x_TD, routing.weight_TK, home, counts_E, experts), none


def answered(
    x_TD: Tensor, weight_TK: Tensor, home: Permutation, counts_E: Tensor, experts: nn.Module
) -> Tensor:
    """Each token's answers from experts that are here, weighted and summed, ``[T, D]``.

    Args:
        home: between the tokens' pairs and rows sorted by expert.
        counts_E: rows of each expert, int64.
    """
    if getattr(experts, "takes_tokens", False):  # experts of a user's own may not
        found: Tensor = experts(x_TD, counts_E, home, weight_TK)
        return found
    return gather(experts(spread(x_TD, home), counts_E), weight_TK, home)


def rows_of_experts(routing: Routing, expert_TK: Tensor) -> Tensor:
    """Rows each of the E experts gets from this rank's tokens, int64 ``[E]`` (see :func:`.permute.plan`)."""
    if routing.num_slots is None:
        return count(expert_TK, routing.num_experts + 1)[: routing.num_experts]
    return torch.full(
        (routing.num_experts,), routing.num_slots, dtype=torch.int64, device=routing.expert_TK.device
    )


def _stay(rows: Tensor, send: list[int], recv: list[int], what: str) -> Tensor:
    """An exchange among one."""
    return rows
