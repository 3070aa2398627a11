"""Experts on rows that arrive a round at a time: all tokens to one expert cost time, not memory.

    forward     round 0: ═all-to-all═▶ experts ═all-to-all═▶ answers │ round 1: … │ …     keeps x and the answers
    backward    round 0: ═x═▶ experts again, ◀═ gradients ═▶ their backward ═▶ x's gradient │ round 1: … │ …

Only one round's received rows and activations live at a time, in backward too: there each round's exchange is done
anew, since rows that were kept would be as many as without rounds (cutting a layer into chunks without that saves
next to nothing). The order of exchanges is that of two plain loops, the same on every rank, also on one that gets
no row in some round; a library's recomputation would leave it to which tensors a rank's graph happens to save.

Where all fits into one round nothing is done twice: the round's graph is kept, or in a block that is recomputed
what arrived.

To whoever shards the experts (FSDP2, ZeRO) all rounds are one call of the module: weights are gathered once, and
every weight gets one gradient, the sum over the rounds, in the same order however many there are (DeepSpeed adds
up buckets that it fills in the order of arrival). So groups of ranks that share a weight but not an exchange may
differ in their rounds.

Shape suffixes as in :mod:`parallel.dispatch.base`; M rows received in a round.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from parallel.dispatch.permute import take, weighted_sum
from parallel.dispatch.rounds import Round, Rounds
from parallel.recompute import Rerun, being_taped, recorded

Swap = Callable[[Tensor, list[int], list[int], str], Tensor]
"""``(rows, send, recv, what)``: all-to-all of one round; ``what`` is said where exchanges are checked."""


def run_in_rounds(x_TD: Tensor, rounds: Rounds, swap: Swap, experts: nn.Module) -> Tensor:
    """Answers of the experts to this rank's rows, in home order, ``[N, D]``; zeros where no round sends a row.

    Equal to one exchange of all rows up to the rounding of sums over rows (gradients of the experts' weights), and
    bit-identical when repeated. Collective over the ranks that ``swap`` connects.
    """

    def in_rounds(x_TD: Tensor) -> Tensor:
        # Asked for anew: while FSDP2 computes, other parameters stand in the module.
        weights = [p for p in experts.parameters() if p.requires_grad]
        return _InRounds.apply(x_TD, rounds, swap, experts, torch.is_grad_enabled(), *weights)

    return _inside_calls(list(_hooked(experts)), in_rounds, x_TD)


def _hooked(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if m._forward_pre_hooks or m._forward_hooks)


def _inside_calls(modules: list[nn.Module], compute: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """``compute(x_TD)`` within one call of each module, instead of their own forward.

    What is hooked to them gets their weights ready before it and lets go of them after it, in backward as well.
    """
    if not modules:
        return compute(x_TD)
    module, *others = modules
    own = vars(module)
    before = {"forward": own["forward"]} if "forward" in own else {}  # put there by someone else

    def restore() -> None:
        own.pop("forward", None)
        own.update(before)

    def forward(x_TD: Tensor) -> Tensor:
        restore()
        return _inside_calls(others, compute, x_TD)

    own["forward"] = forward
    try:
        return module(x_TD)
    finally:
        restore()


@contextmanager
def _unhooked(module: nn.Module) -> Iterator[None]:
    """Calls of a module and of those in it are their forwards alone: the call around all rounds had their hooks."""
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in _hooked(module)]
    for m, *_ in kept:
        m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for m, pre_hooks, hooks in kept:
            m._forward_pre_hooks, m._forward_hooks = pre_hooks, hooks


class _InRounds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        rounds: Rounds,
        swap: Swap,
        experts: nn.Module,
        backward_follows: bool,
        *weights: nn.Parameter,
    ) -> Tensor:
        ctx.keeps = backward_follows and len(rounds) == 1
        ctx.rounds, ctx.swap, ctx.experts, ctx.weights = rounds, swap, experts, weights
        ctx.reruns = [Rerun() for _ in range(len(rounds))]
        ctx.kept = None
        ctx.save_for_backward(x_TD)
        # An outer recomputation gets the answers of the first time, as it gets what any exchange brought.
        with _unhooked(experts):
            answers = recorded(lambda: _answers(ctx, x_TD))
        return answers.detach()  # the tape's own tensor must not hold a graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD,) = ctx.saved_tensors
        home = ctx.rounds.home
        sums = _Sums(ctx.weights)
        grad_rows_ND: Tensor | None = None
        for index in range(len(ctx.rounds)):
            one = ctx.rounds[index]
            with _unhooked(ctx.experts):
                grad = _backward(ctx, x_TD, grad_ND, index, one, sums)
            grad_rows_ND = _put(grad, one, ctx.rounds, grad_rows_ND)
        assert grad_rows_ND is not None, "there is at least one round"
        grad_x = weighted_sum(grad_rows_ND, home.row_of_pair_TK, None, home.drops)
        return grad_x, None, None, None, None, *sums.of_weights()


def _answers(ctx: Any, x_TD: Tensor) -> Tensor:
    rounds: Rounds = ctx.rounds
    answers: Tensor | None = None
    for index, rerun in enumerate(ctx.reruns):
        one, name = rounds[index], _name(index, rounds)
        arrived = _sorted(ctx.swap(_rows(x_TD, rounds, one), one.send, one.recv, f"dispatch{name}"), one)
        with _graph_of_its_own(arrived, ctx.keeps and not being_taped()):
            found = rerun.first(ctx.experts, arrived, one.counts_E)
        if ctx.keeps:
            ctx.kept = arrived, _edge(found)
        del arrived
        found = ctx.swap(_unsorted(found.detach(), one), one.recv, one.send, f"combine{name}")
        answers = _put(found, one, rounds, answers)
    assert answers is not None, "there is at least one round"
    return answers


def _backward(ctx: Any, x_TD: Tensor, grad_ND: Tensor, index: int, one: Round, sums: _Sums) -> Tensor:
    """One round forward and backward: gradients of the rows it sends; those of the weights go into ``sums``."""
    name, there, back = _name(index, ctx.rounds), (one.send, one.recv), (one.recv, one.send)
    edge: GradientEdge | None = None
    if ctx.kept is not None:
        (arrived, edge), ctx.kept = ctx.kept, None
    else:
        arrived = _sorted(ctx.swap(_rows(x_TD, ctx.rounds, one), *there, f"dispatch again{name}"), one)
    grad = _sorted(ctx.swap(grad_ND.index_select(0, one.row_N), *there, f"combine (backward){name}"), one)
    if edge is None:
        with _graph_of_its_own(arrived, True):
            edge = _edge(ctx.reruns[index].again(ctx.experts, arrived, one.counts_E))
    of_rows: Tensor | None = None
    if edge is not None:
        leaves = (arrived, *ctx.weights)
        of_rows, *of_weights = torch.autograd.grad(edge, leaves, grad, allow_unused=True)
        sums.add(of_weights)
    del edge, grad
    of_rows = torch.zeros_like(arrived) if of_rows is None else of_rows
    del arrived
    return ctx.swap(_unsorted(of_rows, one), *back, f"dispatch (backward){name}")


def _edge(found: Tensor) -> GradientEdge | None:
    """Where the backward of a round begins, without holding on to its answers.

    None where they have no graph, as of experts that return early where no row arrived.
    """
    return get_gradient_edge(found) if found.requires_grad else None


def _put(part: Tensor, one: Round, rounds: Rounds, whole: Tensor | None) -> Tensor:
    """A round's rows in their places among all of the home rows (a single round has all, in order)."""
    if len(rounds) == 1:
        return part
    if whole is None:
        whole = part.new_zeros(rounds.num_rows, *part.shape[1:])
    return whole.index_copy_(0, one.row_N, part)


def _name(index: int, rounds: Rounds) -> str:
    return "" if len(rounds) == 1 else f", round {index + 1} of {len(rounds)}"


@contextmanager
def _graph_of_its_own(leaf: Tensor, wanted: bool) -> Iterator[None]:
    """What is computed from ``leaf`` has a graph; what that saves is out of reach of hooks around it (an outer
    checkpoint would count it among its own)."""
    if not wanted:
        yield
        return
    leaf.requires_grad_()
    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


class _Sums:
    """Gradients of weights, added up over the rounds in fp32 (or wider)."""

    def __init__(self, weights: tuple[nn.Parameter, ...]) -> None:
        self._weights = weights
        self._sums: list[Tensor | None] = [None] * len(weights)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for index, grad in enumerate(grads):
            found = self._sums[index]
            if grad is None:
                continue
            if found is None:
                self._sums[index] = grad.to(torch.promote_types(grad.dtype, torch.float32))
            else:
                found += grad

    def of_weights(self) -> list[Tensor | None]:
        return [
            None if found is None else found.to(weight.dtype)
            for found, weight in zip(self._sums, self._weights, strict=True)
        ]


def _rows(x_TD: Tensor, rounds: Rounds, one: Round) -> Tensor:
    """The rows that a round sends; straight from the tokens, so that never all rows stand there at once."""
    home = rounds.home
    token_N = torch.div(home.pair_of_row_N[one.row_N], home.num_choices, rounding_mode="floor")
    return take(x_TD, token_N, home.gaps)


def _sorted(rows_MD: Tensor, one: Round) -> Tensor:
    """From order of arrival to order of local experts."""
    return rows_MD if one.order_M is None else rows_MD.index_select(0, one.order_M)


def _unsorted(rows_MD: Tensor, one: Round) -> Tensor:
    if one.order_M is None:
        return rows_MD
    back = torch.empty_like(rows_MD)
    back[one.order_M] = rows_MD
    return back
