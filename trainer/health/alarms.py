"""When the routing of a run is in trouble: one alarm an episode, with evidence and a remedy.

An episode of a kind in a layer begins when a number crosses its threshold (``health.*``) and ends when it is
clearly back; in between nothing is said again. A layer is judged once its window is full, so neither the first
steps nor the first ones after a cure count. All of it follows from numbers that are equal on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.config import RunConfig
from trainer.config_moe import HealthConfig, RouterName
from trainer.health.ranks import expert_ranks, rank_shares
from trainer.health.window import Reading

_NAMED = 4
_MAX_EXPERTS = 16


@dataclass(frozen=True)
class Alarm:
    """A kind of trouble that began or ended in some layers.

    Attributes:
        kind: ``collapse``, ``dead_experts``, ``entropy_low``, ``entropy_fall``, ``rank_starved``, ``drops``.
        state: ``raised`` or ``cleared``.
        layers: block indices that are in this trouble after this alarm, old ones included.
        since: the step at which the trouble that the alarm tells of was first found.
        message: one line for people.
        evidence: a dict a layer that began or ended: ``layer``, ``experts`` and numbers.
        remedy: which config fields to change; empty when cleared.
    """

    kind: str
    state: str
    layers: list[int]
    since: int
    message: str
    evidence: list[dict[str, Any]]
    remedy: str

    def fields(self) -> dict[str, Any]:
        """Of an ``alarm`` event."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Rule:
    """Trouble in a layer is ``value < begins`` (or above, with ``high``), until ``value`` passes ``ends``."""

    kind: str
    value_L: Tensor
    begins: float
    ends: float
    high: bool
    full_windows: int
    tell: Callable[[int], tuple[str, dict[str, Any]]]
    remedy: str

    def bad(self, layer: int, is_open: bool) -> bool:
        value, limit = float(self.value_L[layer]), self.ends if is_open else self.begins
        return value > limit if self.high else value < limit


class Alarms:
    """Judges readings of a :class:`trainer.health.window.Window` and remembers which troubles are open.

    Args:
        config: resolved.
        layers: block index of each MoE layer.

    Attributes:
        open: kind → {block index: step since}.
    """

    def __init__(self, config: RunConfig, layers: list[int]) -> None:
        self.config, self.layers = config, layers
        self.open: dict[str, dict[int, int]] = {}

    def check(self, step: int, reading: Reading) -> list[Alarm]:
        """What began or ended, judged after ``step`` steps."""
        found = []
        for rule in _rules(self.config, reading):
            open_now = self.open.setdefault(rule.kind, {})
            began, ended = [], []
            for place, layer in enumerate(self.layers):
                full = int(reading.num_steps_L[place]) >= rule.full_windows * self.config.health.window
                bad = rule.bad(place, layer in open_now)
                if bad and layer not in open_now and full:
                    began.append(place)
                elif not bad and layer in open_now:
                    ended.append(place)
            since = {self.layers[place]: open_now.pop(self.layers[place]) for place in ended}
            open_now.update((self.layers[place], _since(rule, reading, place, step)) for place in began)
            if began:
                found.append(self._alarm(rule, "raised", began, open_now, rule.remedy))
            if ended:
                found.append(self._alarm(rule, "cleared", ended, since, ""))
        return found

    def _alarm(self, rule: _Rule, state: str, places: list[int], since: dict[int, int], remedy: str) -> Alarm:
        told = [rule.tell(place) for place in places]
        layers = [self.layers[place] for place in places]
        shown = "; ".join(
            f"layer {layer}: {text}" for layer, (text, _) in zip(layers[:_NAMED], told, strict=False)
        )
        more = f"; and {len(layers) - _NAMED} more layers" if len(layers) > _NAMED else ""
        first = min(since[layer] for layer in layers)
        over = f"over, after it began at step {first}: " if state == "cleared" else ""
        evidence = [{"layer": layer, **numbers} for layer, (_, numbers) in zip(layers, told, strict=True)]
        message = f"{over}{shown}{more}"
        return Alarm(rule.kind, state, sorted(self.open[rule.kind]), first, message, evidence, remedy)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {kind: {str(layer): since for layer, since in at.items()} for kind, at in self.open.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was open."""
        self.open = {
            kind: {int(layer): since for layer, since in at.items() if int(layer) in self.layers}
            for kind, at in state.items()
        }


def evenness(reading: Reading, top_k: int) -> Tensor:
    """How evenly a layer's experts share the load, ``[L]``: 1 evenly, 0 when the same k take every token."""
    num_experts = reading.share_LE.shape[1]
    if num_experts <= top_k:
        return torch.ones(len(reading.share_LE), dtype=torch.float64)
    return (reading.num_effective_L - top_k) / (num_experts - top_k)


def _since(rule: _Rule, reading: Reading, place: int, step: int) -> int:
    return step - int(reading.idle_LE[place].max()) if rule.kind == "dead_experts" else step


def _rules(config: RunConfig, reading: Reading) -> list[_Rule]:
    """The thresholds that are set, with this reading's numbers."""
    health = config.health
    rules = []
    if health.collapse:
        rules.append(_collapse(config, reading))
    if health.dead_steps:
        rules.append(_dead_experts(config, reading))
    if config.layout.router is not RouterName.hash:  # its distribution is one-hot by construction
        rules += _entropy(health, reading)
    share_LR = rank_shares(config, reading.share_LE)
    if health.rank_max_over_mean and share_LR is not None and config.layout.capacity_factor is None:
        rules.append(_rank_starved(config, share_LR))
    if health.drop_rate:
        rules.append(_drops(config, reading))
    return rules


def _collapse(config: RunConfig, reading: Reading) -> _Rule:
    layout, limit = config.layout, config.health.collapse
    num_experts = reading.share_LE.shape[1]

    def tell(place: int) -> tuple[str, dict[str, Any]]:
        share_E = reading.share_LE[place]
        num_top = max(1, layout.top_k)
        top = share_E.topk(min(num_top, num_experts)).indices.tolist()
        taken, effective = float(share_E[top].sum()), float(reading.num_effective_L[place])
        experts = ", ".join(map(str, top[:_MAX_EXPERTS]))
        text = (
            f"the load is that of {effective:.1f} of {num_experts} experts "
            f"(expert{'s' if len(top) > 1 else ''} {experts}: {taken:.0%})"
        )
        return text, {
            "experts": top[:_MAX_EXPERTS],
            "share": taken,
            "num_effective": effective,
            "max_over_mean": float(reading.max_over_mean_L[place]),
        }

    remedy = f"{_balance_remedy(config)}, or lower optim.lr while the router settles (optim.warmup_steps)"
    value_L = evenness(reading, layout.top_k)
    return _Rule("collapse", value_L, limit, min(1.0, 1.5 * limit), False, 1, tell, remedy)


def _dead_experts(config: RunConfig, reading: Reading) -> _Rule:
    num_steps = config.health.dead_steps
    dead_LE = reading.idle_LE >= num_steps

    def tell(place: int) -> tuple[str, dict[str, Any]]:
        dead = dead_LE[place].nonzero().flatten().tolist()
        idle = int(reading.idle_LE[place].max())
        if not dead:
            return "every expert has tokens again", {"experts": [], "idle_steps": idle}
        text = (
            f"{len(dead)} of {dead_LE.shape[1]} experts had no token for up to {idle} steps "
            f"({', '.join(map(str, dead[:_MAX_EXPERTS]))}{', …' if len(dead) > _MAX_EXPERTS else ''})"
        )
        return text, {"experts": dead[:_MAX_EXPERTS], "num_dead": len(dead), "idle_steps": idle}

    value_L = dead_LE.sum(1).double()
    remedy = _balance_remedy(config)
    if config.layout.router is not RouterName.hash:
        remedy += ", or let dead experts be revived (cure.revive_dead.enabled=true)"
    return _Rule("dead_experts", value_L, 0.0, 0.0, True, 1, tell, remedy)


def _entropy(health: HealthConfig, reading: Reading) -> list[_Rule]:
    most = math.log(max(2, reading.share_LE.shape[1]))

    def tell(place: int) -> tuple[str, dict[str, Any]]:
        now, before = float(reading.entropy_L[place]), float(reading.slow_entropy_L[place])
        text = f"router entropy {now:.3f} nats, was {before:.3f} on average (even: {most:.2f})"
        return text, {"experts": [], "entropy": now, "entropy_before": before, "entropy_even": most}

    calm = "raise layout.balance.router_z, or lower optim.lr or layout.route_scale"
    rules = []
    if health.entropy:
        limit = health.entropy
        rules.append(_Rule("entropy_low", reading.entropy_L / most, limit, 2 * limit, False, 1, tell, calm))
    if health.entropy_fall:
        ratio_L = reading.entropy_L / reading.slow_entropy_L.clamp_min(1e-12)
        limit = health.entropy_fall
        ends = (1 + limit) / 2
        # The slow mean says something once it has seen more than the window itself.
        rules.append(_Rule("entropy_fall", ratio_L, limit, ends, False, 2, tell, calm))
    return rules


def _rank_starved(config: RunConfig, share_LR: Tensor) -> _Rule:
    ep, limit = config.parallel.ep, config.health.rank_max_over_mean
    ranks = expert_ranks(config.layout, ep)

    def tell(place: int) -> tuple[str, dict[str, Any]]:
        share_R = share_LR[place]
        busy, idle = int(share_R.argmax()), int(share_R.argmin())
        text = (
            f"ep rank {busy} is sent {float(share_R[busy]):.0%} of the pairs, rank {idle} "
            f"{float(share_R[idle]):.0%} (even: {1 / ep:.0%})"
        )
        experts = [expert for expert, rank in enumerate(ranks) if rank == busy]
        return text, {"experts": experts[:_MAX_EXPERTS], "rank": busy, "shares": share_R.tolist()}

    remedy = f"{_balance_remedy(config)}, or fewer ranks for the experts (parallel.ep)"
    return _Rule("rank_starved", ep * share_LR.amax(1), limit, 1 + 0.8 * (limit - 1), True, 1, tell, remedy)


def _drops(config: RunConfig, reading: Reading) -> _Rule:
    limit = config.health.drop_rate

    def tell(place: int) -> tuple[str, dict[str, Any]]:
        dropped, unserved = float(reading.dropped_L[place]), float(reading.unserved_L[place])
        text = f"{dropped:.0%} of the pairs are dropped, {unserved:.0%} of the tokens reach no expert"
        return text, {"experts": [], "drop_rate": dropped, "unserved_rate": unserved}

    factor = config.layout.capacity_factor
    remedy = f"raise layout.capacity_factor (now {factor}; null: nothing is dropped), or " + _balance_remedy(
        config
    )
    return _Rule("drops", reading.dropped_L, limit, 0.8 * limit, True, 1, tell, remedy)


def _balance_remedy(config: RunConfig) -> str:
    balance = config.layout.balance
    if config.layout.router is RouterName.hash:  # nothing learns, so nothing balances
        return "let a router that learns decide (layout.router=top_k)"
    if balance.bias_update_rate:
        return f"raise layout.balance.bias_update_rate (now {balance.bias_update_rate:g})"
    return f"raise layout.balance.coefficient (now {balance.coefficient:g})"
