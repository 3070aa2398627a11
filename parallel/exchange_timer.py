"""How long a rank spends in the exchanges of tokens, and so how long ranks wait for each other.

An exchange ends when the last rank has come. So of the ranks of one exchange, the last to come spends the least
time in it, about what moving the rows takes, and what another spends beyond that it waited.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class ExchangeTimer:
    """Times every exchange between :meth:`begin` and :meth:`waited`.

    On CUDA with events around the call, which cost no sync: a stream waits as long as its collective does.

    Args:
        group: the ranks that exchange with each other.
        device: of the rows.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._num_events = 0

    def begin(self) -> None:
        """Forget what was timed; CUDA events are used again."""
        self._seconds.clear()
        self._num_events = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around one exchange."""
        if self._device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - began)
            return
        if self._num_events == len(self._events):
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        first, last = self._events[self._num_events]
        self._num_events += 1
        first.record()
        yield
        last.record()

    def waited(self) -> float:
        """Seconds that a rank waited in the timed exchanges for the last one to come, mean over all ranks.

        Collective over the world; waits for the device. Ranks of a group take part in the same exchanges.
        """
        mine = torch.tensor(self._taken(), dtype=torch.float64, device=self._device)
        least = mine.clone()
        if len(mine):
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
        total = (mine - least).sum()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def _taken(self) -> list[float]:
        if self._device.type != "cuda":
            return self._seconds
        torch.cuda.current_stream(self._device).synchronize()
        return [first.elapsed_time(last) / 1e3 for first, last in self._events[: self._num_events]]
