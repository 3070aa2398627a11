"""How often the memory tier copies: as told, or so that it costs at most 2 % of the time."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

import torch
import torch.distributed as dist

_SHARE = 0.02
_MEASURED = 3
_AGREE_EVERY = 100


class Cadence:
    """Which steps get a snapshot; the same on every rank.

    With ``every`` = -1 the first three steps do (the first of them fills cold pages). Then, and again every 100
    steps, rank 0 tells the others what its copies and steps have taken.

    Args:
        every: ``checkpoint.memory_every``.
        control: a group over all ranks for small facts.
    """

    def __init__(self, every: int, control: dist.ProcessGroup) -> None:
        self.every, self._control = every, control
        self.automatic = every < 0
        self._num_steps = 0
        self._steps: deque[float] = deque(maxlen=_AGREE_EVERY)
        self._copies: deque[float] = deque(maxlen=_AGREE_EVERY)

    def stepped(self, seconds: float) -> None:
        """A step has ended; ask :meth:`due` next. Collective now and then, with ``every`` = -1."""
        self._num_steps += 1
        self._steps.append(seconds)
        if self.automatic and self._num_steps % _AGREE_EVERY == _MEASURED + 1:
            told = torch.tensor(self._wanted())
            dist.broadcast(told, src=0, group=self._control)
            self.every = int(told)

    def due(self, step: int) -> bool:
        """Whether this step gets a snapshot."""
        if self.automatic and self._num_steps <= _MEASURED:
            return True
        return self.every > 0 and step % self.every == 0

    def copied(self, seconds: float) -> None:
        """A snapshot has made training wait so long."""
        self._copies.append(seconds)

    def _wanted(self) -> int:
        return max(1, math.ceil(median(self._copies) / (_SHARE * max(median(self._steps), 1e-6))))
