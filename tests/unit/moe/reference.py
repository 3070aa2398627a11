"""What each layout computes, written down a second time: one token, one expert at a time, in fp64.

Nothing is shared with the product but the weights. Choices are plain Python sorts over the definition's scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config_moe import LayoutConfig
from trainer.moe.layer import MoeLayer


@dataclass
class Reference:
    """The layer's answer and its sums."""

    y_BSD: Tensor
    chosen: list[list[list[int]]]
    balance: Tensor
    router_z: Tensor
    entropy: float
    confidence: float
    dropped: int = 0
    unserved: int = 0
    counts: list[int] = field(default_factory=list)


def best(values: list[float], k: int, among: list[int] | None = None) -> list[int]:
    """Indices of the k largest, ties to the lower one."""
    candidates = list(range(len(values))) if among is None else among
    return sorted(candidates, key=lambda i: (-values[i], i))[:k]


def run(layer: MoeLayer, x_BSD: Tensor, tokens_BS: Tensor, counted_BS: Tensor) -> Reference:
    """The layer in training, without noise."""
    layout, router = layer.router.layout, layer.router
    x = x_BSD.double()
    batch, length, _ = x.shape
    total = layout.num_experts + layout.num_zero_experts + layout.num_copy_experts
    logits, scores, probabilities, group_logits = _scores(layer, x, tokens_BS)
    chosen = _choices(layer, logits, scores, group_logits, tokens_BS)
    weights = [[_weights(layout, scores[b, s], chosen[b][s]) for s in range(length)] for b in range(batch)]
    kept = _kept(layout, chosen, weights, length)
    y = torch.zeros_like(x)
    result = Reference(
        y, chosen, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0.0, 0.0
    )
    result.counts = [sum(e in experts for row in chosen for experts in row) for e in range(total)]
    rows = []
    for b in range(batch):
        for s in range(length):
            out = torch.zeros_like(x[b, s])
            served = False
            for k, expert in enumerate(chosen[b][s]):
                if expert >= layout.num_experts + layout.num_zero_experts:
                    out = out + weights[b][s][k] * x[b, s]
                    served = True
                elif expert >= layout.num_experts:
                    served = True
                elif (b, s, k) in kept:
                    out = out + weights[b][s][k] * _expert(layer, expert, x[b, s])
                    served = True
                else:
                    result.dropped += 1
            result.unserved += not served
            if layer.shared is not None:
                out = out + _shared(layer, x[b, s])
            rows.append(out)
            p, weight = probabilities[b, s], float(counted_BS[b, s])
            positive = p.detach()[p.detach() > 0]
            result.entropy += weight * float(-(positive * positive.log()).sum())
            result.confidence += weight * float(p.detach().max())
            for z in [logits, group_logits]:
                if z is not None:
                    result.router_z = result.router_z + weight * z[b, s].exp().sum().log() ** 2
    result.y_BSD = torch.stack(rows).view_as(x)
    result.balance = _balance(layout, router.load_E, chosen, probabilities, counted_BS, result.counts)
    return result


def _scores(layer: MoeLayer, x: Tensor, tokens_BS: Tensor):  # type: ignore[no-untyped-def]
    layout, router = layer.router.layout, layer.router
    if layout.router.value == "hash":
        from trainer.moe.choice import hashed  # the draw itself is checked on its own

        drawn = hashed(tokens_BS, layout.num_experts, layout.top_k, router.layer)
        one_hot = F.one_hot(drawn, layout.num_experts).sum(2).double() / layout.top_k
        return None, one_hot, one_hot, None
    logits = x @ router.weight.double().T
    if layout.logit_norm:
        mean, std = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True, correction=0)
        logits = layout.logit_norm * (logits - mean) / std
    if layout.router.value == "hierarchical":
        groups = x @ router.group_weight.double().T
        size = layout.num_experts // layout.num_groups
        p = torch.cat(
            [
                groups.softmax(-1)[..., g : g + 1] * logits[..., g * size : (g + 1) * size].softmax(-1)
                for g in range(layout.num_groups)
            ],
            dim=-1,
        )
        return logits, p, p, groups
    if layout.score.value == "softmax":
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        return logits, p, p, None
    scores = 1 / (1 + (-logits).exp())
    return logits, scores, scores / scores.sum(-1, keepdim=True), None


def _choices(layer: MoeLayer, logits, scores, group_logits, tokens_BS):  # type: ignore[no-untyped-def]
    layout, router = layer.router.layout, layer.router
    batch, length = tokens_BS.shape
    if layout.router.value == "expert_choice":
        return _expert_choices(layout, scores)
    if layout.router.value == "sinkhorn":
        plans = [_sinkhorn(logits[b]) for b in range(batch)]
        return [[best(plans[b][s].tolist(), layout.top_k) for s in range(length)] for b in range(batch)]
    found = []
    for b in range(batch):
        row = []
        for s in range(length):
            biased = scores[b, s].detach().clone()
            if router.bias_E is not None:
                biased = biased + router.bias_E.double()
            values, size = biased.tolist(), layout.num_experts // layout.num_groups
            if layout.router.value == "hierarchical":
                experts: list[int] = []
                for group in best(group_logits[b, s].tolist(), layout.top_groups):
                    inside = list(range(group * size, (group + 1) * size))
                    share = layout.top_k // layout.top_groups
                    experts += best(logits[b, s].tolist(), share, inside)
            elif layout.num_groups > 1:
                strength = [
                    sum(sorted(values[g * size : (g + 1) * size])[-2:]) for g in range(layout.num_groups)
                ]
                groups = best(strength, layout.top_groups)
                experts = best(values, layout.top_k, [e for e in range(len(values)) if e // size in groups])
            else:
                experts = best(values, layout.top_k)
            row.append(experts)
        found.append(row)
    return found


def _expert_choices(layout: LayoutConfig, scores: Tensor) -> list[list[list[int]]]:
    batch, length, num_experts = scores.shape
    assert layout.capacity_factor is not None
    capacity = math.ceil(layout.capacity_factor * length * layout.top_k / num_experts)
    found: list[list[list[int]]] = [[[] for _ in range(length)] for _ in range(batch)]
    for b in range(batch):
        for e in range(num_experts):
            for s in best(scores[b, :, e].tolist(), capacity):
                found[b][s].append(e)
    return found


def _sinkhorn(logits: Tensor) -> Tensor:
    plan = logits.detach().exp()
    for _ in range(16):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan


def _weights(layout: LayoutConfig, score_E: Tensor, experts: list[int]) -> list[Tensor]:
    chosen = [score_E[e] for e in experts]
    if layout.renormalize:
        chosen = [value / sum(chosen) for value in chosen]
    return [value * layout.route_scale for value in chosen]


def _kept(layout: LayoutConfig, chosen, weights, length: int) -> set[tuple[int, int, int]]:  # type: ignore[no-untyped-def]
    pairs = [
        (b, k, s)
        for b, row in enumerate(chosen)
        for k in range(layout.num_experts)
        for s in range(length)
        if k < len(row[s]) and row[s][k] < layout.num_experts
    ]
    if layout.capacity_factor is None or layout.router.value == "expert_choice":
        return {(b, s, k) for b, k, s in pairs}
    capacity = math.ceil(layout.capacity_factor * length * layout.top_k / layout.num_experts)
    if layout.drop_by.value == "score":
        pairs.sort(key=lambda pair: -float(weights[pair[0]][pair[2]][pair[1]]))
    taken: dict[tuple[int, int], int] = {}
    kept = set()
    for b, k, s in pairs:
        place = (b, chosen[b][s][k])
        taken[place] = taken.get(place, 0) + 1
        if taken[place] <= capacity:
            kept.add((b, s, k))
    return kept


def _expert(layer: MoeLayer, expert: int, x: Tensor) -> Tensor:
    sizes = layer.router.layout.expert_sizes
    stack, index = layer.experts, expert
    if sizes:
        for position, size in enumerate(sizes):
            if index < size.num:
                stack = layer.experts.sizes[position]
                break
            index -= size.num
    hidden = F.silu(x @ stack.w1[index].double()) * (x @ stack.w3[index].double())
    return hidden @ stack.w2[index].double()


def _shared(layer: MoeLayer, x: Tensor) -> Tensor:
    s = layer.shared
    out = (F.silu(s.w1.weight.double() @ x) * (s.w3.weight.double() @ x)) @ s.w2.weight.double().T
    if layer.shared_gate is not None:
        out = out / (1 + (-(layer.shared_gate.weight.double() @ x)).exp())
    return out


def _balance(layout, load_E, chosen, probabilities, counted_BS, counts) -> Tensor:  # type: ignore[no-untyped-def]
    total = probabilities.shape[-1]
    loss = torch.zeros((), dtype=torch.float64)
    for b, row in enumerate(chosen):
        own = [sum(e in experts for experts in row) for e in range(total)]
        seen = {"sequence": own, "micro": counts, "step": None if load_E is None else load_E.tolist()}
        observed = seen[layout.balance.scope.value]
        for e in range(total):
            f = observed[e] * total / sum(observed) if sum(observed) else 1.0
            loss = loss + float(counted_BS[b].sum()) * f * probabilities[b, :, e].mean()
    return loss
