"""What a dispatcher is: it takes tokens to the experts they chose and brings the answers home.

    x_TD ──dispatch──▶ rows grouped by local expert ──experts──▶ rows ──combine──▶ y_TD

``run`` is all of it, and where a budget bounds the rows that a rank receives at a time it is the way that keeps to
it (:mod:`parallel.dispatch.bounded`).

A dispatcher is not a module and holds no parameters. ``dispatch`` returns frozen metadata that ``combine``
takes back, so that one dispatcher serves every layer and every micro-batch; a layer that says which one it is
(``at_layer``) is named when ranks diverge.

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


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts, and how to get back.

    Attributes:
        rows_ND: tokens sorted by local expert.
        counts_E: rows of each local expert, int64 on the rows' device; they sum to N.
        metadata: what ``combine`` of the same dispatcher needs.
        num_trips: how often a row of this rank travels to another one or home from there, in forward and backward
            together (0-dim int64), for accounting.
    """

    rows_ND: Tensor
    counts_E: Tensor
    metadata: object
    num_trips: Tensor


class Dispatcher(Protocol):
    """Every backend computes what :class:`parallel.dispatch.local.LocalDispatcher` does."""

    def at_layer(self, index: int) -> Dispatcher:
        """The same dispatcher for the block of this index, which its messages then name."""
        ...

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Group tokens by expert. Collective over the ep axis, in the same order on every rank."""
        ...

    def combine(self, rows_ND: Tensor, routing: Routing, metadata: object) -> Tensor:
        """Weighted sum of each token's answers, ``[T, D]``. Collective like ``dispatch``."""
        ...

    def run(self, x_TD: Tensor, routing: Routing, experts: nn.Module) -> tuple[Tensor, Tensor]:
        """All of it: ``dispatch``, ``experts(rows_ND, counts_E)``, ``combine``.

        Collective like ``dispatch``. With a budget, ``experts`` may be computed in several rounds and again in
        backward; each round it is given different rows and their counts, and it must treat rows one by one.

        Returns:
            ``[T, D]``, and the trips of this rank's rows to others as in :class:`Dispatched`.
        """
        ...
