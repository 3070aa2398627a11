"""What is to be done about uneven and dead experts: decisions from loads that all ranks know alike.

A policy sees every step's totals, which are sums over all ranks and exact integers where it reads them; so each
rank decides the same, in any layout, without asking another. What it has seen is part of a checkpoint. Nothing
here changes the model: :mod:`trainer.cure.cure` does what is decided.

Shape suffixes: L MoE layers, E experts (zero and copy experts last).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.config_moe import AdaptBalanceConfig, RaiseBalanceConfig, ResetBiasConfig, ReviveDeadConfig
from trainer.health.window import Reading, Window
from trainer.moe.surgery import MoeParts, Revival
from trainer.step import Totals


@dataclass(frozen=True)
class Action:
    """Something that is done to one layer, and why.

    Attributes:
        kind: the policy's name.
        layer: place among the MoE layers.
        experts: those that it is about.
        evidence: numbers that led to it.
        before, after: of what is changed, where that is one number.
        message: the same in words.
        revivals: kind revive_dead: who takes whose place.
    """

    kind: str
    layer: int
    experts: list[int]
    evidence: dict[str, Any]
    before: float | None
    after: float | None
    message: str
    revivals: list[Revival] = field(default_factory=list)


class RaiseBalance:
    """``coefficient · min(factor^n, limit)``: n goes up while a layer stays uneven, down once it is even again.

    A balance loss (Switch, arXiv:2101.03961, eq. 4) as strong as a collapse needs would cost quality for the rest
    of the run; Skywork-MoE (arXiv:2406.06563, section 4.2) argues for a coefficient that follows the imbalance.
    Here it is the configured one wherever nothing is wrong.
    """

    name = "raise_balance"

    def __init__(
        self, config: RaiseBalanceConfig, coefficient: float, window: Window, num_layers: int
    ) -> None:
        self.config, self.base, self.window = config, coefficient, window
        self.level_L = [0] * num_layers

    def coefficient(self, layer: int) -> float:
        """In force in a layer."""
        return self.base * min(self.config.factor ** self.level_L[layer], self.config.limit)

    def coefficients(self) -> list[float | Tensor]:
        """In force, a layer each."""
        return [self.coefficient(layer) for layer in range(len(self.level_L))]

    def decide(self, reading: Reading) -> list[Action]:
        """Changes of the coefficient; the window of a layer that is changed begins anew."""
        actions = []
        for layer, ratio in _settled(reading, self.config.patience):
            before = self.coefficient(layer)
            if ratio > self.config.threshold and before < self.base * self.config.limit:
                self.level_L[layer] += 1
            elif ratio < self.config.even and self.level_L[layer]:
                self.level_L[layer] -= 1
            else:
                continue
            after = self.coefficient(layer)
            self.window.forget(layer)
            state = "uneven" if after > before else "even again"
            actions.append(
                Action(
                    self.name, layer, [], {"max_over_mean": ratio}, before, after,
                    f"max/mean {ratio:.2f}, {state}: balance coefficient {before:g} → {after:g}",
                )
            )  # fmt: skip
        return actions

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {"window": self.window.state_dict(), "level": self.level_L}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.window.load_state_dict(state["window"])
        self.level_L = list(state["level"])


class AdaptBalance:
    """``a ← decay · a + (1 − decay) · min(sensitivity · d, maximum)`` after every step, d the layer's drop rate.

    Skywork-MoE, arXiv:2406.06563, equations 7 to 9, with its constants as defaults. Where nothing is dropped, d is
    what a capacity of the mean load would drop: Σ_e max(0, load_e − mean) / Σ_e load_e.
    """

    name = "adapt_balance"

    def __init__(
        self, config: AdaptBalanceConfig, coefficient: float, has_capacity: bool, num_layers: int
    ) -> None:
        self.config, self.has_capacity = config, has_capacity
        self.value_L = torch.full((num_layers,), coefficient, dtype=torch.float64)

    @torch.no_grad()
    def update(self, totals: Totals) -> None:
        """Take in a step. No host sync."""
        load_LE, config = totals.counts_LE.double(), self.config
        pairs_L = load_LE.sum(1).clamp_min(1.0)
        over_L = (load_LE - load_LE.mean(1, keepdim=True)).clamp_min(0.0).sum(1)
        rate_L = (totals.dropped_L.double() if self.has_capacity else over_L) / pairs_L
        wanted_L = (config.sensitivity * rate_L).clamp_max(config.maximum)
        self.value_L = config.decay * self.value_L.to(rate_L.device) + (1.0 - config.decay) * wanted_L

    def coefficients(self) -> list[float | Tensor]:
        """In force, a layer each, on the totals' device."""
        return list(self.value_L.float().unbind())

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {"value": self.value_L.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.value_L = torch.tensor(state["value"], dtype=torch.float64)


class ReviveDead:
    """Which dead expert is to be made from which busy one.

    Dead: no token in the last ``patience`` steps, or next to none on average over as many. Busy: the expert
    with most load, where one that already gave half away counts with half of it; above the mean, since to halve
    an ordinary expert would help nobody. A layer that was operated on is left alone for ``patience`` steps.
    """

    name = "revive_dead"

    def __init__(self, config: ReviveDeadConfig, window: Window, layers: Sequence[MoeParts]) -> None:
        self.config, self.window, self.layers = config, window, layers

    def decide(self, reading: Reading) -> list[Action]:
        """At most ``max_at_once`` revivals in all, those of the layer with most dead experts first."""
        dead = {layer: self._dead(reading, layer) for layer in range(len(self.layers))}
        room, actions = self.config.max_at_once, []
        for layer in sorted(dead, key=lambda number: (-len(dead[number]), number)):
            revivals = self._match(reading, layer, dead[layer][:room])
            if revivals:
                room -= len(revivals)
                actions.append(self._action(reading, layer, revivals, len(dead[layer])))
        return actions

    def _dead(self, reading: Reading, layer: int) -> list[int]:
        num = self.layers[layer].num_experts  # zero and copy experts have nothing to revive
        idle_E = reading.idle_LE[layer, :num] >= self.config.patience
        if int(reading.num_steps_L[layer]) >= self.config.patience:
            idle_E = idle_E | (reading.ratio_LE[layer, :num] <= self.config.threshold)
        return torch.nonzero(idle_E).flatten().tolist()

    def _match(self, reading: Reading, layer: int, dead: list[int]) -> list[Revival]:
        parts = self.layers[layer]
        load = dict(enumerate(reading.ratio_LE[layer, : parts.num_experts].tolist()))
        revivals = []
        for expert in dead:
            able = [
                other
                for other, ratio in load.items()
                if ratio > 1.0 and other not in dead and parts.interchangeable(expert, other)
            ]
            if able:
                busy = max(able, key=lambda other: (load[other], -other))
                load[busy] /= 2
                revivals.append(Revival(expert, busy))
        return revivals

    def _action(self, reading: Reading, layer: int, revivals: list[Revival], num_dead: int) -> Action:
        ratio_E, idle_E = reading.ratio_LE[layer].tolist(), reading.idle_LE[layer].tolist()
        names = ", ".join(f"{revival.dead} from {revival.busy}" for revival in revivals)
        return Action(
            self.name,
            layer,
            [revival.dead for revival in revivals],
            {
                "max_over_mean": max(ratio_E),
                "idle_steps": [idle_E[revival.dead] for revival in revivals],
                "load_over_mean": [ratio_E[revival.dead] for revival in revivals],
                "busy": [revival.busy for revival in revivals],
                "busy_over_mean": [ratio_E[revival.busy] for revival in revivals],
            },
            float(num_dead),
            float(num_dead - len(revivals)),
            f"{num_dead} dead; experts revived: {names}",
            revivals,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {"window": self.window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.window.load_state_dict(state["window"])


class ResetBias:
    """Whether the bias of auxiliary-loss-free balancing (arXiv:2408.15664) has run away.

    It moves by a fixed step for as long as an expert is off the mean. If the loads do not follow (an expert that
    died, a router that saturated), it grows until it alone decides: scores are between 0 and 1, so from a spread
    of 1 on no score can overrule it. From 0 on, scores decide again and the bias is learnt anew.
    """

    name = "reset_bias"

    def __init__(self, config: ResetBiasConfig, window: Window, biases: Sequence[Tensor]) -> None:
        self.config, self.window, self.biases = config, window, biases

    def decide(self, reading: Reading) -> list[Action]:
        """Resets; looks at the bias (a host sync) only where the loads are uneven."""
        actions = []
        for layer, ratio in _settled(reading, self.config.patience):
            if ratio <= self.config.threshold:
                continue
            bias_E = self.biases[layer].double().cpu()
            spread = float(bias_E.max() - bias_E.min())
            if spread >= self.config.spread:
                actions.append(
                    Action(
                        self.name, layer, [], {"max_over_mean": ratio, "spread": spread}, spread, 0.0,
                        f"max/mean {ratio:.2f} with a bias spread of {spread:.3g}: bias set to 0",
                    )
                )  # fmt: skip
        return actions

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {"window": self.window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.window.load_state_dict(state["window"])


def _settled(reading: Reading, patience: int) -> list[tuple[int, float]]:
    """(layer, max / mean) of the layers whose window has seen ``patience`` steps."""
    ratios = reading.max_over_mean_L.tolist()
    return [
        (layer, ratio) for layer, ratio in enumerate(ratios) if int(reading.num_steps_L[layer]) >= patience
    ]
