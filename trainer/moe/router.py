"""Routers: scores, choices and combine weights of every token. Always fp32: in bf16 between 0.2 and 2 % of
the choices change.

Shape suffixes: B packed rows, S positions, T = B·S tokens, D model width, E experts (the zero and copy ones
last), K choices a token, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.dispatch.base import Routing
from parallel.recompute import recorded
from trainer.config_moe import BalanceScope, LayoutConfig, RouterName, Score
from trainer.moe import balance, choice
from trainer.moe.balance import MoeStats
from trainer.moe.capacity import places, row_capacity
from trainer.moe.noise import uniform
from trainer.moe.positions import Positions
from trainer.moe.replay import choice_or_given


class Scored(NamedTuple):
    """How a token likes each expert.

    Attributes:
        score_BSE: what weighs the experts, with gradient.
        probability_BSE: the same as a distribution, for balance, entropy and confidence.
        logits: each ``[B, S, ·]``, the gates' outputs, for the z-loss and for Sinkhorn.
    """

    score_BSE: Tensor
    probability_BSE: Tensor
    logits: tuple[Tensor, ...]


class Decision(NamedTuple):
    """What is discrete about a routing, taken once and replayed under recompute.

    Attributes:
        expert_BSK: chosen experts; E: none.
        sent_BSK: where a pair travels: a real expert, or ``layout.num_experts`` for nowhere.
        slot_BSK: with a capacity, the place in the expert's buffer, -1: nowhere; else None.
    """

    expert_BSK: Tensor
    sent_BSK: Tensor
    slot_BSK: Tensor | None


class Routed(NamedTuple):
    """A layer's routing, its sums (``sent`` left at 0), and the weight of a token in its own answer
    (``[B, S]``, None without copy experts)."""

    routing: Routing
    stats: MoeStats
    copy_BS: Tensor | None


class Router(nn.Module):
    """Top-k routing over softmax or sigmoid scores; what others change is a method of their own.

    Softmax: Switch (arXiv:2101.03961), GShard (arXiv:2006.16668), Mixtral (arXiv:2401.04088). Sigmoid with a
    bias on the choice (not on the weight) and group limits: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).
    Normalised logits: Skywork-MoE (arXiv:2406.06563, section 4.1). Zero and copy experts: MoE++
    (arXiv:2410.07348).

    Args:
        layer: index of the block, which keys its noise.
    """

    keep_fp32 = True

    def __init__(self, dim: int, layout: LayoutConfig, layer: int = 0) -> None:
        super().__init__()
        self.layout, self.layer = layout, layer
        self.num_choosable = layout.num_experts + layout.num_zero_experts + layout.num_copy_experts
        self._make_gates(dim)
        self.bias_E: Tensor | None
        self.load_E: Tensor | None
        bias = torch.zeros(self.num_choosable) if layout.balance.bias_update_rate > 0 else None
        self.register_buffer("bias_E", bias)
        by_step = layout.balance.scope is BalanceScope.step
        load = torch.zeros(self.num_choosable, dtype=torch.int64) if by_step else None
        self.register_buffer("load_E", load)

    def _make_gates(self, dim: int) -> None:
        self.weight = nn.Parameter(torch.empty(self.num_choosable, dim))

    def forward(self, x_BSD: Tensor, positions: Positions) -> Routed:
        """Route every token."""
        layout = self.layout
        scored = self._score(self._input(x_BSD, positions), positions)
        capacity = row_capacity(layout, x_BSD.shape[1])
        decision = recorded(lambda: self._decide(scored, positions, capacity))
        weight_BSK = self._weigh(scored.score_BSE, decision.expert_BSK)
        flat = (-1, weight_BSK.shape[-1])
        slot_BSK = decision.slot_BSK
        routing = Routing(
            expert_TK=decision.sent_BSK.reshape(flat),
            weight_TK=weight_BSK.reshape(flat),
            num_experts=layout.num_experts,
            slot_TK=None if slot_BSK is None else slot_BSK.reshape(flat),
            num_slots=None if capacity is None else x_BSD.shape[0] * capacity,
            partial=self.num_choosable > layout.num_experts or layout.sample_second,
            class_sizes=tuple(size.num for size in layout.expert_sizes) or (layout.num_experts,),
        )
        return Routed(routing, self._stats(scored, decision, positions), self._copied(weight_BSK, decision))

    @property
    def learns_from_loads(self) -> bool:
        """Whether :meth:`after_step` changes anything."""
        return self.bias_E is not None or self.load_E is not None

    def after_step(self, counts_E: Tensor) -> None:
        """Take in the routed pairs of a whole step over all ranks, int64 ``[E]``."""
        weights = self.layout.balance
        if self.bias_E is not None:
            balance.update_bias_(self.bias_E, counts_E, weights.bias_update_rate, weights.bias_update)
        if self.load_E is not None:
            self.load_E.copy_(counts_E)

    def _input(self, x_BSD: Tensor, positions: Positions) -> Tensor:
        """fp32; in training with multiplicative jitter (Switch, arXiv:2101.03961, section 2.4)."""
        x_BSD = x_BSD.float()
        jitter = self.layout.jitter
        if jitter and self.training and positions.key_B is not None:
            noise = uniform(positions.key_B, f"jitter of layer {self.layer}", *x_BSD.shape[1:])
            x_BSD = x_BSD * (1.0 - jitter + 2.0 * jitter * noise)
        return x_BSD

    def _score(self, x_BSD: Tensor, positions: Positions) -> Scored:
        logits = self._normalised(F.linear(x_BSD, self.weight.float()))
        if self.layout.score is Score.softmax:
            probability = logits.softmax(-1)
            return Scored(probability, probability, (logits,))
        score = logits.sigmoid()
        return Scored(score, score / (score.sum(-1, keepdim=True) + 1e-20), (logits,))

    def _normalised(self, logits_BSE: Tensor) -> Tensor:
        if not self.layout.logit_norm:
            return logits_BSE
        centred = logits_BSE - logits_BSE.mean(-1, keepdim=True)
        return self.layout.logit_norm * centred / (centred.square().mean(-1, keepdim=True).sqrt() + 1e-6)

    def _choose(self, scored: Scored, positions: Positions) -> Tensor:
        """The K experts of each token, int64 ``[B, S, K]``."""
        layout, score_BSE = self.layout, scored.score_BSE
        if self.bias_E is not None:
            score_BSE = score_BSE + self.bias_E.float()
        if layout.top_groups < layout.num_groups:
            return choice.group_limited(score_BSE, layout.top_k, layout.num_groups, layout.top_groups)
        return choice.top_k(score_BSE, layout.top_k)

    @torch.no_grad()
    def _decide(self, scored: Scored, positions: Positions, capacity: int | None) -> Decision:
        layout = self.layout
        expert_BSK = choice_or_given(lambda: self._choose(scored, positions))
        sent_BSK = expert_BSK.clamp(max=layout.num_experts)
        weight_BSK = self._weigh(scored.score_BSE, expert_BSK)
        if layout.sample_second and self.training and positions.key_B is not None:
            draw = uniform(positions.key_B, f"second of layer {self.layer}", expert_BSK.shape[1])
            skipped = draw >= 2.0 * weight_BSK[..., 1]  # GShard, arXiv:2006.16668, algorithm 1
            sent_BSK[..., 1].masked_fill_(skipped, layout.num_experts)
        if capacity is None:
            return Decision(expert_BSK, sent_BSK, None)
        slot_BSK = places(sent_BSK, weight_BSK, layout.num_experts, capacity, layout.drop_by)
        return Decision(expert_BSK, sent_BSK, slot_BSK)

    def _weigh(self, score_BSE: Tensor, expert_BSK: Tensor) -> Tensor:
        """Combine weights of the chosen experts; 0 where there is none."""
        weight = score_BSE.gather(-1, expert_BSK.clamp(max=self.num_choosable - 1))
        if self.layout.router is RouterName.expert_choice:
            weight = weight.masked_fill(expert_BSK == self.num_choosable, 0.0)
        if self.layout.renormalize:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return weight * self.layout.route_scale

    def _copied(self, weight_BSK: Tensor, decision: Decision) -> Tensor | None:
        layout = self.layout
        if not layout.num_copy_experts:
            return None
        first = layout.num_experts + layout.num_zero_experts
        return weight_BSK.masked_fill(decision.expert_BSK < first, 0.0).sum(-1)

    def _stats(self, scored: Scored, decision: Decision, positions: Positions) -> MoeStats:
        expert_BSK, sent_BSK, slot_BSK = decision
        counted_BS, probability_BSE = positions.counted_BS, scored.probability_BSE
        real_B = counted_BS.sum(1) > 0  # a row without targets only fills up a batch
        counts_BE = balance.row_counts(expert_BSK, self.num_choosable) * real_B[:, None]
        observed = {
            BalanceScope.sequence: counts_BE,
            BalanceScope.micro: counts_BE.sum(0, keepdim=True),
            BalanceScope.step: None if self.load_E is None else self.load_E[None],
        }[self.layout.balance.scope]
        assert observed is not None
        fraction_BE = balance.load_fraction(observed, probability_BSE.dtype)
        dropped = unserved = torch.zeros((), dtype=torch.int64, device=expert_BSK.device)
        if slot_BSK is not None:
            away = sent_BSK < self.layout.num_experts
            dropped = (away & (slot_BSK < 0) & real_B[:, None, None]).sum()
            # A zero or copy expert serves without a place.
            served = (slot_BSK >= 0) | (~away & (expert_BSK < self.num_choosable))
            unserved = (~served.any(-1) & real_B[:, None]).sum()
        return MoeStats(
            balance=balance.balance_loss(fraction_BE, probability_BSE, counted_BS.sum(1)),
            router_z=sum(
                (balance.router_z(logits, counted_BS) for logits in scored.logits), counted_BS.new_zeros(())
            ),
            entropy=balance.entropy(probability_BSE.detach(), counted_BS),
            confidence=(probability_BSE.detach().amax(-1) * counted_BS).sum(),
            counts_E=counts_BE.sum(0),
            dropped=dropped,
            unserved=unserved,
            sent=torch.zeros_like(dropped),
            expert_BSK=expert_BSK,
        )


class HierarchicalRouter(Router):
    """Two gates: which groups, and which experts inside each; ``p(e) = p(group) · p(e | group)``.

    Hierarchical mixtures (Jordan & Jacobs 1994; arXiv:1701.06538, appendix B). Experts of a group are
    neighbours, so with ``parallel.ep`` a multiple of ``layout.num_groups`` a group lives on neighbouring
    ranks, and on one node where a node holds a multiple of ep / num_groups ranks.
    """

    def _make_gates(self, dim: int) -> None:
        super()._make_gates(dim)
        self.group_weight = nn.Parameter(torch.empty(self.layout.num_groups, dim))

    def _score(self, x_BSD: Tensor, positions: Positions) -> Scored:
        group = F.linear(x_BSD, self.group_weight.float())
        logits = self._normalised(F.linear(x_BSD, self.weight.float()))
        within = logits.unflatten(-1, (self.layout.num_groups, -1))
        probability = (group.softmax(-1)[..., None] * within.softmax(-1)).flatten(-2)
        return Scored(probability, probability, (logits, group))

    def _choose(self, scored: Scored, positions: Positions) -> Tensor:
        logits, group = scored.logits
        within = logits.unflatten(-1, (self.layout.num_groups, -1))
        return choice.two_level(group, within, self.layout.top_k, self.layout.top_groups)


class SinkhornRouter(Router):
    """In training the choice follows a balanced assignment of each row, the weight the plain scores; outside
    of training, where the future is not to be seen, plain top-k (S-BASE, arXiv:2202.01169)."""

    def _choose(self, scored: Scored, positions: Positions) -> Tensor:
        if not self.training:
            return super()._choose(scored, positions)
        return choice.sinkhorn(scored.logits[0], self.layout.top_k)


class ExpertChoiceRouter(Router):
    """Experts choose tokens (arXiv:2202.09368): even by construction, and a leak of the future.

    The pick of a token depends on the later tokens of its row, in evaluation as in training, so the loss of
    such a model is not that of a causal one. A text on its way has no row to pick from
    (:func:`trainer.generation.dropless`): there each token goes to the experts that it likes best.
    """

    def _choose(self, scored: Scored, positions: Positions) -> Tensor:
        capacity = row_capacity(self.layout, scored.score_BSE.shape[1])
        if capacity is None:
            return super()._choose(scored, positions)
        return choice.expert_choice(scored.score_BSE, capacity)


class HashRouter(Router):
    """Nothing is learnt: the token's id decides (Hash Layers, arXiv:2106.04426). A baseline."""

    def _make_gates(self, dim: int) -> None:
        pass

    def _score(self, x_BSD: Tensor, positions: Positions) -> Scored:
        expert_BSK = choice.hashed(
            positions.tokens_BS, self.layout.num_experts, self.layout.top_k, self.layer
        )
        shape = (*expert_BSK.shape[:2], self.num_choosable)
        score = torch.zeros(shape, device=x_BSD.device).scatter_(-1, expert_BSK, 1.0 / self.layout.top_k)
        return Scored(score, score, ())

    def _choose(self, scored: Scored, positions: Positions) -> Tensor:
        return choice.hashed(positions.tokens_BS, self.layout.num_experts, self.layout.top_k, self.layer)


_ROUTERS = {
    RouterName.top_k: Router,
    RouterName.hierarchical: HierarchicalRouter,
    RouterName.sinkhorn: SinkhornRouter,
    RouterName.expert_choice: ExpertChoiceRouter,
    RouterName.hash: HashRouter,
}


def build_router(dim: int, layout: LayoutConfig, layer: int) -> Router:
    """The router that the layout names, for the block of this index."""
    return _ROUTERS[layout.router](dim, layout, layer)
