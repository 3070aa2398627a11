"""One MoE layer's dispatch, experts and combine with routing made by hand: as skewed as is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bench.live import LiveBytes
from parallel.dispatch.all_to_all import AllToAllDispatcher
from parallel.dispatch.base import Routing
from trainer.config import Activation
from trainer.moe.experts import Experts


@dataclass(frozen=True)
class Sizes:
    """T tokens a rank, K choices, E experts in all, D wide, F inside."""

    tokens: int = 256
    choices: int = 2
    experts: int = 8
    dim: int = 64
    ffn_dim: int = 96

    @property
    def rows(self) -> int:
        """That a rank sends, and that it gets if all get as many."""
        return self.tokens * self.choices


class OneLayer:
    """What one rank of the default group holds; the same weights however many ranks there are.

    Args:
        skew: share of the tokens that all go to the first K experts, which live on rank 0; the rest go anywhere.
    """

    def __init__(self, sizes: Sizes, skew: float) -> None:
        self.sizes, rank, world = sizes, dist.get_rank(), dist.get_world_size()
        g = torch.Generator().manual_seed(rank)
        T, K, E = sizes.tokens, sizes.choices, sizes.experts
        self.x = torch.randn(T, sizes.dim, generator=g, requires_grad=True)
        self.weight = torch.rand(T, K, generator=g, requires_grad=True)
        self.probe = torch.randn(T, sizes.dim, generator=g)
        anywhere = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
        hot = torch.arange(T)[:, None] < skew * T
        self.routing = Routing(torch.where(hot, torch.arange(K), anywhere), self.weight, E)
        self.experts = Experts(E, sizes.dim, sizes.ffn_dim, Activation.swiglu)
        g = torch.Generator().manual_seed(1000)
        for name, weight in list(self.experts.named_parameters()):
            whole = torch.randn(weight.shape, generator=g) / weight.shape[1] ** 0.5
            setattr(self.experts, name, torch.nn.Parameter(whole.chunk(world)[rank].clone()))

    def step(self, budget: int | None) -> list[Tensor]:
        """Forward and backward: the answers and all gradients. Collective."""
        leaves = self.leaves()
        for leaf in leaves:
            leaf.grad = None
        dispatcher = AllToAllDispatcher(dist.group.WORLD, budget=budget)
        y, _ = dispatcher.run(self.x, self.routing, self.experts)
        y.backward(self.probe)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, *self.experts.parameters()]

    def most_rows(self) -> int:
        """That any rank receives. Collective."""
        place = self.routing.expert_TK // (self.sizes.experts // dist.get_world_size())
        rows = torch.bincount(place.flatten(), minlength=dist.get_world_size())
        dist.all_reduce(rows)
        return int(rows.max())

    def peak(self, budget: int | None) -> int:
        """Bytes that :meth:`step` makes live at once on this rank, beside its inputs. Collective."""
        for leaf in self.leaves():
            leaf.grad = None
        with LiveBytes() as live:
            self.step(budget)
        return live.peak


def bound(sizes: Sizes, world: int, budget: int) -> int:
    """Bytes that no rank's step exceeds in fp32 with one thread, however tokens are routed (docs/memory.md)."""
    D, F = sizes.dim, sizes.ffn_dim
    rows = min(budget, world * sizes.rows)
    block = min(512, -(-rows // 4)) if rows >= 256 else rows
    in_flight = rows * (2 * F + 5 * D + 6) + block * (4 * F + 2 * D)
    cut = 3 * D * F
    weights = 3 * (sizes.experts // world) * D * F
    at_home = sizes.rows * (2 * D + 12) + sizes.tokens * D
    combining = sizes.rows * (5 * D + 12) + sizes.tokens * D
    return 4 * max(combining, at_home + in_flight + 2 * weights + cut)
