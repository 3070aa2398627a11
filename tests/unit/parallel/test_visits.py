"""Where tokens go and what rides with them, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.dispatch.visits import Trip, Visits, return_home, row_bytes, visit

RANKS, LOCAL = 3, 4
NOWHERE = RANKS * LOCAL


class Mirror:
    """An exchange in which a rank's visits come back to itself; ``row_bytes`` of each trip of a row."""

    def __init__(self) -> None:
        self.row_bytes: list[int] = []

    def __call__(self, rows: Tensor, send: list[int], recv: list[int], what: str, backward: bool) -> Tensor:
        self.row_bytes.append(rows.shape[1] * rows.element_size())
        return rows.clone()


def places(num_tokens: int, num_choices: int, seed: int = 0) -> Tensor:
    """Any places and nowhere; a token may choose one twice."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, NOWHERE + 1, (num_tokens, num_choices), generator=g)


@pytest.mark.parametrize(("num_tokens", "num_choices"), [(20, 5), (7, 1), (1, 12), (0, 3)])
def test_a_visit_for_each_rank_of_each_token(num_tokens: int, num_choices: int) -> None:
    place_TK = places(num_tokens, num_choices)
    visits = Visits.plan(place_TK, RANKS, LOCAL)
    expected = [
        (rank, token)
        for rank in range(RANKS)
        for token in range(num_tokens)
        if any(place // LOCAL == rank for place in place_TK[token].tolist())
    ]
    assert visits.token_P[: len(expected)].tolist() == [token for _, token in expected]
    for rank in range(RANKS):
        assert visits.counts[rank, 0] == sum(one == rank for one, _ in expected)
        for local in range(LOCAL):
            assert visits.counts[rank, 1 + local] == (place_TK == rank * LOCAL + local).sum()
    for token, row in enumerate(place_TK.tolist()):
        mine = [index for index, (_, one) in enumerate(expected) if one == token]
        assert sorted(index for index in visits.row_TR[token].tolist() if index >= 0) == mine
        cells = [
            visits.cell_TK()[token, k].item() // num_choices for k, place in enumerate(row) if place < NOWHERE
        ]
        assert [expected[index] for index in cells] == [
            (place // LOCAL, token) for place in row if place < NOWHERE
        ]
    taken = visits.cell_TK()[place_TK < NOWHERE].tolist()
    assert len(set(taken)) == len(taken), "a cell for each choice"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 8])
def test_what_arrives_and_what_comes_home(dtype: torch.dtype, width: int) -> None:
    """What leaves arrives as it is, in the bytes that are said, and gradients likewise."""
    place_TK, mirror, g = places(6, 3), Mirror(), torch.Generator().manual_seed(9)
    visits = Visits.plan(place_TK, RANKS, LOCAL)
    send = visits.counts[:, 0].tolist()
    trip = Trip(visits, send, send, mirror, LOCAL)
    x = torch.randn(6, width, generator=g).to(dtype).requires_grad_()
    weight = torch.rand(6, 3, generator=g).requires_grad_()
    x_MW, weight_MK, expert_MK = visit(x, weight, trip)
    arrived = list(zip(x_MW.tolist(), weight_MK.tolist(), expert_MK.tolist(), strict=True))
    token_N = trip.token_N.tolist()
    assert len(arrived) == len(token_N) == sum(send)
    seen = set()
    for token, (row, weights, experts) in zip(token_N, arrived, strict=True):
        assert row == x[token].tolist()
        for value, expert in zip(weights, experts, strict=True):
            if expert == LOCAL:
                assert value == 0.0
            else:
                seen.add((token, expert, value))
    assert seen == {
        (token, place % LOCAL, weight[token, k].item())
        for token, row in enumerate(place_TK.tolist())
        for k, place in enumerate(row)
        if place < NOWHERE
    }
    y = return_home(x_MW, trip)
    times = torch.tensor([token_N.count(token) for token in range(6)])
    torch.testing.assert_close(y, (x * times[:, None]).to(dtype))
    (y.double().sum() + (weight_MK.double() * (expert_MK + 1)).sum()).backward()
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad, times[:, None].expand(6, width).to(dtype))
    wanted = torch.where(place_TK < NOWHERE, place_TK % LOCAL + 1, 0)
    torch.testing.assert_close(weight.grad, wanted.to(weight.dtype))
    assert sum(mirror.row_bytes) == row_bytes(width, dtype, 3, torch.float32)
