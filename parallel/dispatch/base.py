"""What a dispatcher is: it takes tokens to the experts they chose and brings the answers home.

    x_TD ──dispatch──▶ rows grouped by local expert ──experts──▶ rows ──combine──▶ y_TD

A dispatcher is not a module, holds no parameters and keeps nothing from call to call, so that one serves every
layer and every micro-batch; a layer that says which one it is (``at_layer``) is named when ranks diverge.

Shape suffixes: T tokens on this rank, K choices a token, E experts, N rows, D model width. A *pair* is one
(token, choice); its flat number is ``t · K + k``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

TRIPS = 4
"""How often a row travels: to its expert and back, forward and backward."""


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    Attributes:
        expert_TK: chosen experts, int64; E where a pair goes nowhere.
        weight_TK: combine weights, fp32, with gradient.
        num_experts: E.
        slot_TK: with a capacity, the pair's place in its expert's buffer of ``num_slots`` rows, or -1
            where it is dropped; None in dropless mode.
        num_slots: rows of one expert's buffer over all packed rows of this rank; None in dropless mode.
        partial: whether a pair may go nowhere without a capacity (it costs a host sync to leave it out).
        class_sizes: experts of each class of equal shape, in order of their numbers; they add up to E. Every
            ep rank holds its share of every class. Empty: all are of one class.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    num_experts: int
    slot_TK: Tensor | None = None
    num_slots: int | None = None
    partial: bool = False
    class_sizes: tuple[int, ...] = ()


class Dispatcher(Protocol):
    """Every backend computes what :class:`parallel.dispatch.local.LocalDispatcher` does."""

    def at_layer(self, index: int) -> Dispatcher:
        """The same dispatcher for the block of this index, which its messages then name."""
        ...

    def run(self, x_TD: Tensor, routing: Routing, experts: nn.Module) -> tuple[Tensor, Tensor]:
        """Each token's answers, weighted and summed. Collective over the ep axis, in the same order on every rank.

        ``experts(rows_ND, counts_E)`` is given rows sorted by local expert and how many each gets. With a budget it
        may be called in several rounds and again in backward; each round it is given different rows, and it must
        treat rows one by one.

        Returns:
            ``[T, D]``, and the bytes that this rank's tokens make travel to other ranks and back, forward and
            backward (0-dim int64).
        """
        ...
