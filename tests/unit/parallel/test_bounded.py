"""Rounds: how rows are cut into them, and that experts in rounds are the experts, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parallel.dispatch.base import Routing
from parallel.dispatch.bounded import run_in_rounds
from parallel.dispatch.local import LocalDispatcher
from parallel.dispatch.permute import Permutation
from parallel.dispatch.rounds import Rounds, cut, num_rounds
from parallel.recompute import recomputed, recorded

T, K, E, D = 30, 2, 4, 16


def test_pieces_of_a_stream_and_of_a_destination_differ_by_at_most_one_row() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        sources, destinations, rounds = (int(torch.randint(1, 7, (), generator=g)) for _ in range(3))
        rows_SD = torch.randint(0, 9, (sources, destinations), generator=g)
        pieces = cut(rows_SD, rounds)
        assert torch.equal(pieces.sum(0), rows_SD)
        for sizes in (pieces, pieces.sum(1)):
            assert int((sizes.amax(0) - sizes.amin(0)).max()) <= 1


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 100])
def test_the_number_of_rounds_is_the_least(budget: int) -> None:
    rows_SD = torch.tensor([[5, 0, 1], [5, 3, 0], [4, 1, 0]])
    rounds = num_rounds(14, budget)
    assert int(cut(rows_SD, rounds).sum(1).max()) <= budget
    assert rounds == 1 or (rounds - 1) * budget < 14
    assert num_rounds(0, budget) == 1


def test_every_row_is_sent_once_to_its_expert_and_ranks_expect_what_is_sent() -> None:
    counts_SDE = torch.tensor([[[3, 2], [0, 1]], [[0, 4], [2, 2]]])  # two ranks with two experts each
    plans = []
    for rank in range(2):
        key = torch.arange(4).repeat_interleave(counts_SDE[rank].flatten())[:, None]
        home = Permutation.by_key(key)
        plans.append(Rounds.plan(home, counts_SDE.sum(2), rank, 4, counts_SDE[:, rank]))
    sent: list[list[Tensor]] = [[], []]
    arrived = torch.zeros(2, 2, dtype=torch.int64)
    for index in range(4):
        both = [plan[index] for plan in plans]
        for source, one in enumerate(both):
            sent[source].append(one.row_N)
            assert one.recv == [other.send[source] for other in both]
            assert sum(one.recv) <= 3, "9 and 5 rows in 4 rounds"
            arrived[source] += one.counts_E
            # What arrives, as the experts that the senders meant, is in order after sorting.
            meant = torch.cat(
                [
                    torch.arange(4)
                    .repeat_interleave(counts_SDE[s].flatten())[other.row_N]
                    .split(other.send)[source]
                    for s, other in enumerate(both)
                ]
            )
            assert one.order_M is not None
            expected = torch.arange(2).repeat_interleave(one.counts_E) + 2 * source
            assert torch.equal(meant[one.order_M], expected)
    for source in range(2):
        rows = torch.cat(sent[source]).sort().values
        assert torch.equal(rows, torch.arange(int(counts_SDE[source].sum())))
    assert torch.equal(arrived, counts_SDE.sum(0))


class Noisy(nn.Module):
    """Experts of one matrix each with dropout and something that is decided once."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, D, D, generator=torch.Generator().manual_seed(1)))
        self.dropout, self.decided = dropout, 0

    def decide(self) -> float:
        self.decided += 1
        return float(self.decided)

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        factor = recorded(self.decide) if self.dropout else 1.0
        parts = zip(rows_ND.split(counts_E.tolist()), self.w.unbind(), strict=True)
        y = torch.cat([(rows @ w).tanh() for rows, w in parts])
        return nn.functional.dropout(y, self.dropout) * factor


def routed(kind: str) -> Routing:
    g = torch.Generator().manual_seed(3)
    expert_TK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    weight_TK = torch.rand(T, K, generator=g, requires_grad=True)
    if kind == "dropless":
        return Routing(expert_TK, weight_TK, E)
    if kind == "some go nowhere":
        nowhere = torch.rand(T, K, generator=g) < 0.3
        return Routing(expert_TK.masked_fill(nowhere, E), weight_TK, E, partial=True)
    flat = nn.functional.one_hot(expert_TK.flatten(), E).cumsum(0)
    slot_TK = flat.gather(1, expert_TK.flatten()[:, None]).view(T, K) - 1
    return Routing(expert_TK, weight_TK, E, torch.where(slot_TK < 13, slot_TK, -1), 13)


def run(kind: str, budget: int | None, how: str = "plain") -> list[Tensor]:
    """The answers and all gradients."""
    routing, experts = routed(kind), Noisy()
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(2), requires_grad=how != "frozen input")
    experts.requires_grad_(how != "frozen experts")

    def layer(x: Tensor) -> Tensor:
        return LocalDispatcher(budget).run(x, routing, experts)[0]

    y = recomputed(layer, x) if how == "recomputed" else layer(x)
    y.backward(torch.randn(T, D, generator=torch.Generator().manual_seed(4)))
    leaves = (x, routing.weight_TK, experts.w)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("kind", ["dropless", "some go nowhere", "capacity"])
@pytest.mark.parametrize("how", ["plain", "recomputed", "frozen experts", "frozen input"])
@pytest.mark.parametrize("budget", [1000, 23, 7])
def test_rounds_change_nothing_but_roundings(kind: str, how: str, budget: int) -> None:
    expected, found, again = run(kind, None, how), run(kind, budget, how), run(kind, budget, how)
    assert len(found) == len(expected) == (4 if how in ("plain", "recomputed") else 3)
    for a, b, c in zip(found, again, expected, strict=True):
        assert torch.equal(a, b)
        assert float(torch.linalg.vector_norm(a - c) / torch.linalg.vector_norm(c)) < 1e-6


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("budget", [1000, 7])
def test_experts_that_draw_and_decide_do_so_once_a_round(budget: int, outer: bool) -> None:
    """The gradient is that of the answers that were given: a finite difference of the recorded function."""
    routing, experts = routed("dropless"), Noisy(dropout=0.5).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    moved = 1e-5 * torch.randn_like(x)

    def layer(x: Tensor) -> Tensor:
        return LocalDispatcher(budget).run(x, routing, experts)[0]

    torch.manual_seed(5)
    y = recomputed(layer, x) if outer else layer(x)
    y.sum().backward()
    rounds = num_rounds(T * K, budget)
    assert experts.decided == rounds
    experts.decided = 0
    torch.manual_seed(5)
    with torch.no_grad():
        difference = (layer(x + moved) - y).sum()
    assert experts.decided == rounds
    assert x.grad is not None
    assert float(difference) == pytest.approx(float((x.grad * moved).sum()), rel=1e-3)


def test_a_second_backward_over_a_kept_graph_finds_the_same() -> None:
    for budget in (1000, 7):
        routing, experts = routed("dropless"), Noisy()
        x = torch.randn(T, D, requires_grad=True)
        y = LocalDispatcher(budget).run(x, routing, experts)[0].sum()
        (first,) = torch.autograd.grad(y, x, retain_graph=True)
        assert torch.equal(torch.autograd.grad(y, x)[0], first)


def test_hooks_see_one_call_around_all_rounds() -> None:
    """What gathers weights before a module and frees them after it does so once, forward and backward."""
    routing, experts = routed("dropless"), Noisy()
    seen: list[str] = []
    experts.register_forward_pre_hook(lambda *_: seen.append("before"))
    experts.register_forward_hook(lambda *_: seen.append("after"))
    x = torch.randn(T, D, requires_grad=True)
    LocalDispatcher(7).run(x, routing, experts)[0].sum().backward()
    assert seen == ["before", "after"]
    experts(x, torch.tensor([T, 0, 0, 0]))
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("budget", [1000, 7])
def test_without_gradients_the_answers_are_the_same_and_no_graph_is_made(budget: int) -> None:
    experts, plain = Noisy(), Noisy()
    seen: list[bool] = []

    def forward(rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return plain(rows_ND, counts_E)

    experts.forward = forward  # type: ignore[method-assign]
    x = torch.randn(T, D)
    with torch.no_grad():
        y = LocalDispatcher(budget).run(x, routed("dropless"), experts)[0]
        expected = LocalDispatcher().run(x, routed("dropless"), plain)[0]
    torch.testing.assert_close(y, expected)
    assert seen == [False] * num_rounds(T * K, budget)


@pytest.mark.parametrize("outer", [False, True])
def test_exchanges_come_in_one_order_and_are_named(outer: bool) -> None:
    """A recomputed block exchanges no more than one that is not."""
    named: list[str] = []

    def swap(rows: Tensor, send: list[int], recv: list[int], what: str) -> Tensor:
        named.append(what)
        return rows

    home = Permutation.by_key(torch.arange(T)[:, None])
    experts = Noisy()
    for rounds, suffixes in ((1, [""]), (2, [", round 1 of 2", ", round 2 of 2"])):
        plan = Rounds.plan(home, torch.tensor([[T]]), 0, rounds, torch.tensor([[T, 0, 0, 0]]))
        x = torch.randn(T, D, requires_grad=True)

        def layer(x: Tensor, plan: Rounds = plan) -> Tensor:
            return run_in_rounds(x, plan, swap, experts).sin()

        (recomputed(layer, x) if outer else layer(x)).sum().backward()
        again = ["dispatch again"] if rounds > 1 else []
        backward = [*again, "combine (backward)", "dispatch (backward)"]
        forward = ["dispatch", "combine"]
        assert named == [
            kind + suffix for kinds in (forward, backward) for suffix in suffixes for kind in kinds
        ]
        named.clear()
