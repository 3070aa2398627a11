"""What the timer counts and how it compares ranks; never how long anything takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from parallel.dispatch.all_to_all import AllToAllDispatcher
from parallel.dispatch.base import Routing
from parallel.exchange_timer import ExchangeTimer
from parallel.recompute import recomputed
from tests.distributed.pool import Pool


class Echo(torch.nn.Module):
    """Experts that answer what they are given."""

    def forward(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        return rows_ND


def count_exchanges(rank: int, world: int) -> list[int]:
    group = dist.group.WORLD
    assert group is not None
    timer = ExchangeTimer(group, torch.device("cpu"))
    dispatcher = AllToAllDispatcher(group, timer=timer).at_layer(3)
    experts = torch.arange(6)[:, None] % 4
    routing = Routing(experts, torch.ones(6, 1), num_experts=4)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return dispatcher.run(x, routing, Echo())[0]

    found = []
    x = torch.randn(6, 4, requires_grad=True)
    for forward in (layer, lambda x: recomputed(layer, x)):
        timer.begin()
        y = forward(x)
        found.append(len(timer._seconds))
        y.square().sum().backward()
        found.append(len(timer._seconds))
    return found


def compare(rank: int, world: int) -> list[float]:
    """Two ep groups of two ranks, timed by hand; an evaluation without exchanges."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    timer = ExchangeTimer(groups[rank // 2], torch.device("cpu"))
    found = [timer.waited()]
    timer._seconds = [[1.0, 2.0], [3.0, 1.0], [5.0, 1.0], [5.0, 2.0]][rank]
    return [*found, timer.waited()]


def test_every_exchange_is_timed_once(pool: Pool) -> None:
    for counts in pool.run(count_exchanges, 2):
        # Forward: counts, rows there, rows back; backward: both ways of the rows; recomputed: none again.
        assert counts == [3, 5, 3, 5]


def test_waiting_is_what_goes_beyond_the_last_rank_to_come(pool: Pool) -> None:
    results: list[Any] = pool.run(compare, 4)
    assert results == [[0.0, (0 + 1 + 2 + 0 + 0 + 0 + 0 + 1) / 4]] * 4
