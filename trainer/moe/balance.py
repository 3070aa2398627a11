"""What keeps experts evenly used, and what is counted about it.

Every value here is a sum over rows or tokens; the trainer divides once by the step's global target tokens.
A row's balance loss is weighted by its number of target tokens, so that rows without targets add nothing and
the result does not depend on how rows are split over ranks and micro-batches.

Shape suffixes: B packed rows, S positions, E experts (zero and copy experts counted), K choices a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parallel.dispatch.permute import count
from trainer.config_moe import BiasUpdate


class MoeStats(NamedTuple):
    """Sums of one MoE layer over one micro-batch (a tuple, so that it passes through checkpointing).

    Attributes:
        balance: Σ rows (target tokens · balance loss), with gradient.
        router_z: Σ target tokens · z-loss, with gradient.
        entropy: Σ target tokens · entropy of the routing distribution in nats.
        confidence: Σ target tokens · the largest probability of the routing distribution.
        counts_E: routed pairs of each expert before any drop, of rows with targets, int64.
        dropped: pairs over capacity, of the same rows, int64.
        unserved: tokens of which every pair was dropped, or that no expert picked, int64.
        sent: bytes to other ranks and back, forward and backward, int64.
        expert_BSK: the choices themselves, int64; E where there is none.
    """

    balance: Tensor
    router_z: Tensor
    entropy: Tensor
    confidence: Tensor
    counts_E: Tensor
    dropped: Tensor
    unserved: Tensor
    sent: Tensor
    expert_BSK: Tensor


def row_counts(expert_BSK: Tensor, num_experts: int) -> Tensor:
    """Pairs of each expert in each row, int64 ``[B, E]``; choices of E (none) are not counted."""
    batch = expert_BSK.shape[0]
    row = torch.arange(batch, device=expert_BSK.device)[:, None, None]
    bins = num_experts + 1
    return count(expert_BSK + row * bins, batch * bins).view(batch, bins)[:, :num_experts]


def load_fraction(counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """``f_e``: an expert's pairs / the mean, over the last dim; 1 where nothing was counted yet."""
    total = counts_E.sum(-1, keepdim=True)
    scale = (counts_E.shape[-1] / total.clamp_min(1).double()).to(dtype)
    return torch.where(total > 0, counts_E.to(dtype) * scale, 1.0)


def balance_loss(fraction_BE: Tensor, probability_BSE: Tensor, weight_B: Tensor) -> Tensor:
    """Balance loss, summed over rows with weights: for a row ``Σ_e f_e P_e``, 1 when perfectly even.

    ``P_e`` is the mean probability of e in the row, ``f_e`` its load (no gradient). With the row's own load
    it is DeepSeek-V3's sequence-wise loss (arXiv:2412.19437, eq. 17-20); with the load of a batch, Switch's
    (arXiv:2101.03961, eq. 4), which with that of all ranks keeps experts free to specialise
    (arXiv:2501.11873).

    Args:
        fraction_BE: :func:`load_fraction` of what the scope counts, ``[B, E]`` or ``[1, E]``.
    """
    return ((fraction_BE * probability_BSE.mean(1)).sum(-1) * weight_B).sum()


def router_z(logits_BSE: Tensor, weight_BS: Tensor) -> Tensor:
    """``Σ logsumexp(logits)²`` over weighted tokens (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return (logits_BSE.logsumexp(-1).square() * weight_BS).sum()


def entropy(probability_BSE: Tensor, weight_BS: Tensor) -> Tensor:
    """``Σ −Σ_e p log p`` over weighted tokens, nats."""
    return (torch.special.entr(probability_BSE).sum(-1) * weight_BS).sum()


@torch.no_grad()
def update_bias_(bias_E: Tensor, counts_E: Tensor, rate: float, update: BiasUpdate) -> None:
    """Auxiliary-loss-free balancing (arXiv:2408.15664): an expert with more pairs than the mean goes down,
    one with fewer goes up: by ``rate``, or by ``rate · (load / mean - 1)``.

    Args:
        counts_E: routed pairs of the whole step over all ranks, int64, the same on every rank.
    """
    total = counts_E.sum()
    surplus = counts_E * counts_E.numel() - total  # integers: exact under any layout
    if update is BiasUpdate.sign:
        move = surplus.sign().to(bias_E.dtype)
    else:
        move = (surplus.double() / total.clamp_min(1)).to(bias_E.dtype)
    bias_E.sub_(rate * move)
