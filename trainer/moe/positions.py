"""What a feed-forward layer may know of the positions it works on, beside their activations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Positions(NamedTuple):
    """B packed rows of S positions (a tuple, so that it passes through checkpointing).

    Attributes:
        counted_BS: 1.0 where a position's prediction is counted in the loss, else 0.0; fp32.
        tokens_BS: the input tokens, int64.
        key_B: what noise is drawn from, int64: a function of (seed, sample), so the same under any layout.
            None where there is no noise: evaluation, generation, a layout without any.
    """

    counted_BS: Tensor
    tokens_BS: Tensor
    key_B: Tensor | None = None
