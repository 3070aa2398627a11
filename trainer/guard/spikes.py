"""Loss spikes: how far a loss stands above those before it, in robust standard deviations."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

_MAD_TO_SIGMA = 1.4826
"""Of a normal distribution (Rousseeuw and Croux, JASA 1993)."""


class Spikes:
    """A window over the losses of committed steps.

    Args:
        sigma: from which deviation a loss is a spike; 0: never.
        size: of the window, in steps; nothing is a spike before it is full.
    """

    def __init__(self, sigma: float, size: int) -> None:
        self.sigma = sigma
        self._losses: deque[float] = deque(maxlen=size)

    def threshold(self) -> float:
        """Loss above which the next step is a spike, nats a token; infinite where nothing is judged."""
        if not self.sigma or len(self._losses) < (self._losses.maxlen or 0):
            return math.inf
        middle = median(self._losses)
        deviation = median(abs(loss - middle) for loss in self._losses)
        # A window of equal losses has no deviation; rounding alone must not be a spike.
        return middle + self.sigma * _MAD_TO_SIGMA * max(deviation, 1e-6 * abs(middle))

    def add(self, loss: float) -> None:
        """A step with this loss was committed."""
        if self.sigma:
            self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; without a state the window begins empty."""
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))
