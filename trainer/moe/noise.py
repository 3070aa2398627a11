"""Random numbers of a forward pass, keyed by sample and position: the same under any layout and recompute."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.bits import mix64, mix64_int, name_key, signed


def sample_keys(sample_ids_B: Tensor, seed: int) -> Tensor:
    """A key a packed row, int64 ``[B]``. A sample's number is its place in the run, so it tells the step too."""
    return mix64(sample_ids_B ^ signed(mix64_int(seed)))


def uniform(key_B: Tensor, purpose: str, *shape: int) -> Tensor:
    """Uniform in [0, 1), fp32 ``[B, *shape]``: a function of (key, purpose, index inside the row) alone.

    Args:
        purpose: what it is for, as in ``"jitter of layer 3"``; other purposes give independent numbers.
    """
    index = torch.arange(math.prod(shape), device=key_B.device)
    row = mix64(key_B ^ signed(name_key(purpose)))
    word = mix64(row[:, None] + index)  # SplitMix64: a stream is its state plus the index, mixed
    return ((word >> 40) & ((1 << 24) - 1)).to(torch.float32).mul_(2.0**-24).view(-1, *shape)
