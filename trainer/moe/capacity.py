"""Which pairs find a place where experts take a fixed number of tokens of each packed row.

By row, so that what is dropped does not depend on how rows are spread over ranks and micro-batches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.config_moe import DropBy, LayoutConfig


def row_capacity(layout: LayoutConfig, length: int) -> int | None:
    """Tokens that an expert takes of a row of ``length`` (GShard, arXiv:2006.16668, section 2.2).

    None: dropless. Expert choice always has a capacity: it is what an expert picks (arXiv:2202.09368).
    """
    if layout.capacity_factor is None:
        return None
    return math.ceil(layout.capacity_factor * length * layout.top_k / layout.num_experts)


def places(
    expert_BSK: Tensor, weight_BSK: Tensor, num_experts: int, capacity: int, drop_by: DropBy
) -> Tensor:
    """The place of each pair in its expert's buffer, int64 ``[B, S, K]``; -1: dropped.

    By position: first choices before second ones, earlier positions first (GShard). By score: the heaviest
    first (batch-prioritized routing, V-MoE, arXiv:2106.05974), equal ones by position.

    Args:
        expert_BSK: chosen experts; ``num_experts`` and above: none, which gets -1.

    Returns:
        Row b's places of an expert are ``b · capacity …``, so an expert's buffer holds all rows' places.
    """
    batch, length, num_choices = expert_BSK.shape
    by_choice = expert_BSK.transpose(1, 2).reshape(batch, -1)  # all first choices, then all second ones
    order = torch.arange(by_choice.shape[1], device=by_choice.device).expand(batch, -1)
    if drop_by is DropBy.score:
        order = weight_BSK.transpose(1, 2).reshape(batch, -1).argsort(dim=1, descending=True, stable=True)
    ordered, inner = by_choice.gather(1, order).sort(dim=1, stable=True)
    order = order.gather(1, inner)
    experts = torch.arange(num_experts, device=by_choice.device).expand(batch, -1).contiguous()
    start_BE = torch.searchsorted(ordered, experts)
    place = torch.arange(ordered.shape[1], device=ordered.device)
    place = place - start_BE.gather(1, ordered.clamp(max=num_experts - 1))
    place = place.masked_fill(ordered >= num_experts, capacity)
    place = torch.empty_like(place).scatter_(1, order, place)
    place = place.view(batch, num_choices, length).transpose(1, 2)
    row = torch.arange(batch, device=place.device)[:, None, None]
    return torch.where(place < capacity, row * capacity + place, -1)
