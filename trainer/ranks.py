"""Work that the ranks of a job share out, in lock step: the experts and gathered weights of one serve all."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


class Ranks:
    """The default process group, or this process alone where there is none.

    Every rank makes the same calls in the same order, and as many forward passes of the model as the others.
    """

    def __init__(self) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if grouped else 0
        self.size = dist.get_world_size() if grouped else 1

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in fp64. Collective."""
        total = torch.tensor(values, dtype=torch.float64)  # on the CPU: no device waits for it
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def share(self, items: list[T]) -> list[T]:
        """This rank's part of what every rank holds."""
        return items[self.rank :: self.size]

    def join(self, part: list[Any], num_items: int) -> list[Any]:
        """The whole again from each rank's answers to its :meth:`share` of ``num_items``. Collective."""
        parts: list[Any] = [part]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, part)
        whole: list[Any] = [None] * num_items
        for rank, answers in enumerate(parts):
            whole[rank :: self.size] = answers
        return whole


def idle(model: nn.Module, device: torch.device) -> None:
    """One call of the model for the sake of the ranks that have rows left."""
    model(torch.zeros(1, 1, dtype=torch.int64, device=device))
