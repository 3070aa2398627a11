"""Which experts a token goes to, given its scores: one function a rule. None of them carries a gradient.

Shape suffixes: B packed rows, S positions, E experts, K choices a token, G groups. Ties go to the lower index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.bits import mix64, name_key, signed

SINKHORN_ITERATIONS = 16


def top_k(score_BSE: Tensor, k: int) -> Tensor:
    """The K best-scored experts, best first, int64 ``[B, S, K]`` (Shazeer et al., arXiv:1701.06538)."""
    return score_BSE.topk(k, dim=-1).indices


def group_limited(score_BSE: Tensor, k: int, num_groups: int, top_groups: int) -> Tensor:
    """The K best inside the best groups: a token travels to few nodes (DeepSeek-V3, arXiv:2412.19437, 2.1.2).

    A group of neighbouring experts scores the sum of its two best.
    """
    grouped = score_BSE.unflatten(-1, (num_groups, -1))
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool)
    chosen.scatter_(-1, best.topk(top_groups, dim=-1).indices, True)
    return top_k(grouped.masked_fill(~chosen[..., None], -math.inf).flatten(-2), k)


def two_level(group_BSG: Tensor, within_BSGE: Tensor, k: int, top_groups: int) -> Tensor:
    """The best groups by the first gate, then K / top_groups experts in each by the second.

    Hierarchical mixtures (Jordan & Jacobs 1994; arXiv:1701.06538, appendix B), made sparse on both levels. A
    group is ``within.shape[-1]`` neighbouring experts.
    """
    group_size = within_BSGE.shape[-1]
    groups = group_BSG.topk(top_groups, dim=-1).indices
    inside = within_BSGE.gather(2, groups[..., None].expand(-1, -1, -1, group_size))
    chosen = inside.topk(k // top_groups, dim=-1).indices
    return (groups[..., None] * group_size + chosen).flatten(-2)


def sinkhorn(logits_BSE: Tensor, k: int) -> Tensor:
    """The K best after a row's logits were made an even assignment (S-BASE, arXiv:2202.01169, section 3).

    Sinkhorn's iteration in logarithms: in turns every token's and every expert's share are made equal. What a
    token gets depends on the later tokens of its row, so this is for training only.
    """
    plan = logits_BSE
    for _ in range(SINKHORN_ITERATIONS):
        plan = plan - plan.logsumexp(2, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return top_k(plan, k)


def hashed(tokens_BS: Tensor, num_experts: int, k: int, layer: int) -> Tensor:
    """Experts drawn by the token's id alone (Hash Layers, arXiv:2106.04426, section 3; k > 1: MultiHash).

    The k-th choice falls among the k-th of K equal parts of the experts, so no expert is drawn twice.
    """
    part = num_experts // k
    words = [mix64(tokens_BS ^ signed(name_key(f"layer {layer} choice {i}"))) for i in range(k)]
    return torch.stack([(word >> 1).remainder(part) + i * part for i, word in enumerate(words)], dim=-1)


def expert_choice(score_BSE: Tensor, capacity: int) -> Tensor:
    """Each expert picks its ``capacity`` best tokens of each row (arXiv:2202.09368), int64 ``[B, S, E]``.

    Entry (b, s, e) is e where expert e picked the token and E where it did not. A pick depends on the later
    tokens of the row: it leaks the future, and a model trained so is no honest next-token predictor.
    """
    num_experts = score_BSE.shape[-1]
    picked = score_BSE.topk(min(capacity, score_BSE.shape[1]), dim=1).indices
    mine = torch.zeros_like(score_BSE, dtype=torch.bool).scatter_(1, picked, True)
    experts = torch.arange(num_experts, device=score_BSE.device)
    return torch.where(mine, experts, num_experts)
