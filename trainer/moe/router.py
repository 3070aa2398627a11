"""Which experts a token goes to. Always fp32: in bf16 between 0.2 and 2 % of the choices change.

Shape suffixes: B rows, S positions, T = B·S tokens, D model width, E experts, K choices a token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.dispatch.base import Routing
from parallel.dispatch.permute import count
from parallel.recompute import recorded
from trainer.config import LayoutConfig, Score
from trainer.moe import balance
from trainer.moe.balance import MoeStats


class Router(nn.Module):
    """Top-k routing over softmax or sigmoid scores.

    Softmax: Switch (arXiv:2101.03961), Mixtral (arXiv:2401.04088). Sigmoid with a bias on the choice (not on
    the weight) and group limits: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2). Capacity is per packed row
    (``ceil(factor · S · K / E)`` places an expert), first choices before second ones, earlier positions
    first, so that what is dropped does not depend on how rows are spread over ranks.
    """

    keep_fp32 = True

    def __init__(self, dim: int, layout: LayoutConfig) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.empty(layout.num_experts, dim))
        self.bias_E: Tensor | None
        bias = torch.zeros(layout.num_experts) if layout.balance.bias_update_rate > 0 else None
        self.register_buffer("bias_E", bias)

    def forward(self, x_BSD: Tensor, targets_BS: Tensor) -> tuple[Routing, MoeStats]:
        """Route every token.

        Args:
            targets_BS: weight of each token in the loss (1 or 0), fp32.

        Returns:
            The routing of the ``B·S`` tokens, and the layer's sums (``sent`` is left at 0).
        """
        logits_BSE = F.linear(x_BSD.float(), self.weight.float())
        scores_BSE, probability_BSE = self._scores(logits_BSE)
        expert_BSK = recorded(lambda: self._choose(scores_BSE.detach()))
        weight_BSK = scores_BSE.gather(-1, expert_BSK)
        if self.layout.renormalize:
            weight_BSK = weight_BSK / (weight_BSK.sum(-1, keepdim=True) + 1e-20)
        weight_BSK = weight_BSK * self.layout.route_scale
        slot_BSK, num_slots = self._slots(expert_BSK)
        none = torch.zeros((), dtype=torch.int64, device=x_BSD.device)
        stats = MoeStats(
            balance=balance.sequence_balance(probability_BSE, expert_BSK, targets_BS.sum(1)),
            router_z=balance.router_z(logits_BSE, targets_BS),
            entropy=balance.entropy(probability_BSE.detach(), targets_BS),
            counts_E=count(expert_BSK, self.layout.num_experts),
            dropped=none if slot_BSK is None else (slot_BSK < 0).sum(),
            sent=none,
        )
        flat = (-1, self.layout.top_k)
        routing = Routing(
            expert_TK=expert_BSK.view(flat),
            weight_TK=weight_BSK.view(flat),
            num_experts=self.layout.num_experts,
            slot_TK=None if slot_BSK is None else slot_BSK.reshape(flat),
            num_slots=num_slots,
        )
        return routing, stats

    def _scores(self, logits_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """Scores that weigh the experts, and the same as a distribution (for balance and entropy)."""
        if self.layout.score is Score.softmax:
            scores = logits_BSE.softmax(-1)
            return scores, scores
        scores = logits_BSE.sigmoid()
        return scores, scores / (scores.sum(-1, keepdim=True) + 1e-20)

    @torch.no_grad()
    def _choose(self, scores_BSE: Tensor) -> Tensor:
        """The K experts of each token, int64 ``[B, S, K]``."""
        if self.bias_E is not None:
            scores_BSE = scores_BSE + self.bias_E.float()
        num_groups, top_groups = self.layout.num_groups, self.layout.top_groups
        if top_groups < num_groups:
            grouped = scores_BSE.unflatten(-1, (num_groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            chosen = torch.zeros_like(best, dtype=torch.bool)
            chosen.scatter_(-1, best.topk(top_groups, dim=-1).indices, True)
            scores_BSE = grouped.masked_fill(~chosen[..., None], -math.inf).flatten(-2)
        return scores_BSE.topk(self.layout.top_k, dim=-1).indices

    @torch.no_grad()
    def _slots(self, expert_BSK: Tensor) -> tuple[Tensor | None, int | None]:
        """With a capacity: each pair's place in its expert's buffer, -1 over capacity; static shapes."""
        if self.layout.capacity_factor is None:
            return None, None
        batch, length, num_choices = expert_BSK.shape
        num_experts = self.layout.num_experts
        capacity = math.ceil(self.layout.capacity_factor * length * num_choices / num_experts)
        by_choice = expert_BSK.transpose(1, 2).reshape(batch, -1)  # all first choices, then all second ones
        ordered, order = by_choice.sort(dim=1, stable=True)
        experts = torch.arange(num_experts, device=expert_BSK.device).expand(batch, -1).contiguous()
        start_BE = torch.searchsorted(ordered, experts)
        place = torch.arange(ordered.shape[1], device=ordered.device) - start_BE.gather(1, ordered)
        place = torch.empty_like(place).scatter_(1, order, place)
        place = place.view(batch, num_choices, length).transpose(1, 2)
        row = torch.arange(batch, device=place.device)[:, None, None]
        return torch.where(place < capacity, row * capacity + place, -1), batch * capacity
