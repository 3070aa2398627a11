"""What keeps experts evenly used, and what is counted about it.

Every value here is a sum over rows or tokens; the trainer divides once by the step's global target tokens.
A row's balance loss is weighted by its number of target tokens, so that rows without targets add nothing and
the result does not depend on how rows are split over ranks and micro-batches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallel.dispatch.permute import count


class MoeStats(NamedTuple):
    """Sums of one MoE layer over one micro-batch (a tuple, so that it passes through checkpointing).

    Attributes:
        balance: Σ rows (target tokens · balance loss), with gradient.
        router_z: Σ target tokens · z-loss, with gradient.
        entropy: Σ target tokens · entropy of the routing distribution in nats.
        counts_E: routed pairs of each expert before any drop, int64.
        dropped: pairs over capacity, int64.
        sent: rows that left this rank in dispatch, int64.
    """

    balance: Tensor
    router_z: Tensor
    entropy: Tensor
    counts_E: Tensor
    dropped: Tensor
    sent: Tensor


def sequence_balance(probability_BSE: Tensor, expert_BSK: Tensor, weight_B: Tensor) -> Tensor:
    """Sequence-wise balance loss, summed over rows with weights.

    For a row: ``Σ_e f_e P_e`` with ``f_e = E / (K S) · (pairs routed to e)`` and ``P_e`` the mean probability
    of e (DeepSeek-V3, arXiv:2412.19437, eq. 17–20; with K = 1 the loss of Switch, arXiv:2101.03961, eq. 4,
    taken by row). It is 1 when perfectly balanced. Counts carry no gradient.
    """
    batch, length, num_experts = probability_BSE.shape
    num_choices = expert_BSK.shape[2]
    row = torch.arange(batch, device=expert_BSK.device)[:, None, None]
    counts_BE = count(expert_BSK + row * num_experts, batch * num_experts).view(batch, num_experts)
    fraction_BE = counts_BE.to(probability_BSE.dtype) * (num_experts / (num_choices * length))
    return ((fraction_BE * probability_BSE.mean(1)).sum(-1) * weight_B).sum()


def router_z(logits_BSE: Tensor, weight_BS: Tensor) -> Tensor:
    """``Σ logsumexp(logits)²`` over weighted tokens (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return (logits_BSE.logsumexp(-1).square() * weight_BS).sum()


def entropy(probability_BSE: Tensor, weight_BS: Tensor) -> Tensor:
    """``Σ −Σ_e p log p`` over weighted tokens, nats."""
    return (torch.special.entr(probability_BSE).sum(-1) * weight_BS).sum()


@torch.no_grad()
def update_bias_(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """Auxiliary-loss-free balancing (arXiv:2408.15664): an expert with more pairs than the mean goes down
    by ``rate``, one with fewer goes up.

    Args:
        counts_E: routed pairs of the whole step over all ranks, int64, the same on every rank.
    """
    surplus = counts_E * counts_E.numel() - counts_E.sum()  # integers: exact under any layout
    bias_E.sub_(rate * surplus.sign().to(bias_E.dtype))
