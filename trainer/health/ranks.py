"""Which ep rank answers for which expert, and how evenly the ranks are loaded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.config import RunConfig
from trainer.config_moe import LayoutConfig


def expert_ranks(layout: LayoutConfig, ep: int) -> list[int]:
    """The ep rank of each real expert: its share of neighbours of every class of equal shape, as
    :class:`parallel.dispatch.all_to_all.AllToAllDispatcher` places them. Zero and copy experts have none."""
    sizes = [size.num for size in layout.expert_sizes] or [layout.num_experts]
    return [int(rank) for size in sizes for rank in np.repeat(np.arange(ep), size // ep)]


def rank_shares(config: RunConfig, load_LE: Tensor) -> Tensor | None:
    """Share of a layer's pairs that each ep rank is sent, before drops: fp64 ``[L, ep]``, rows of sum 1.

    Args:
        load_LE: counts or shares of experts, zero and copy experts last: these stay at home.

    Returns:
        None without expert parallelism, and where the layers are not the layout's.
    """
    layout, ep = config.layout, config.parallel.ep
    num_experts = layout.num_experts + layout.num_zero_experts + layout.num_copy_experts
    if ep == 1 or load_LE.shape[1] != num_experts:
        return None
    ranks = torch.tensor(expert_ranks(layout, ep), device=load_LE.device)
    load_LR = torch.zeros(len(load_LE), ep, dtype=torch.float64, device=load_LE.device)
    load_LR.index_add_(1, ranks, load_LE[:, : len(ranks)].double())
    total_L1 = load_LR.sum(1, keepdim=True)
    return torch.where(total_L1 > 0, load_LR / total_L1, 1.0 / ep)
