"""Carrying out what the policies decide, after each optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.engines.base import Engine
from trainer.bits import mix64_int
from trainer.config import RunConfig
from trainer.cure.policies import Action, AdaptBalance, RaiseBalance, ResetBias, ReviveDead
from trainer.cure.rules import enabled
from trainer.health.window import Window
from trainer.metrics.step import moe_layer_numbers
from trainer.moe.router import Router
from trainer.moe.surgery import MoeParts, moe_parts, reset_bias, revive
from trainer.step import Stepper, Totals

Windowed = ReviveDead | ResetBias | RaiseBalance


class Cure:
    """Watches a run's loads and acts on its model, as the config says.

    Args:
        engine: prepared.
        stepper: whose balance coefficients are set.
        control: a group over all ranks for small facts.

    Attributes:
        windowed: policies that decide now and then, in the order in which they are asked: who operates on a layer
            leaves nothing to decide there for the others.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, stepper: Stepper, control: dist.ProcessGroup
    ) -> None:
        self.config, self.engine, self.stepper, self.control = config, engine, stepper, control
        self.layers: list[MoeParts] = moe_parts(engine.model)
        self.numbers = moe_layer_numbers(config, len(self.layers))
        cure, layout = config.cure, config.layout
        num, coefficient = len(self.layers), layout.balance.coefficient
        self.windowed: list[Windowed] = []
        if cure.revive_dead.enabled:
            window = self._window(cure.revive_dead.patience)
            self.windowed.append(ReviveDead(cure.revive_dead, window, self.layers))
        if cure.reset_bias.enabled:
            window = self._window(cure.reset_bias.patience)
            self.windowed.append(ResetBias(cure.reset_bias, window, _biases(engine)))
        self.raised: RaiseBalance | None = None
        if cure.raise_balance.enabled:
            window = self._window(cure.raise_balance.patience)
            self.raised = RaiseBalance(cure.raise_balance, coefficient, window, num)
            self.windowed.append(self.raised)
        self.adapted: AdaptBalance | None = None
        if cure.adapt_balance.enabled:
            self.adapted = AdaptBalance(
                cure.adapt_balance, coefficient, layout.capacity_factor is not None, num
            )
        self._set_coefficients()

    def _window(self, patience: int) -> Window:
        return Window(patience, self.config.train.global_batch * self.config.train.seq_len)

    def after_step(self, step: int, totals: Totals) -> list[dict[str, Any]]:
        """Take in the totals of step ``step`` (now done) and act. Collective.

        Returns:
            The fields of an event ``cure`` for each action.
        """
        for policy in self.windowed:
            policy.window.update(totals)
        if self.adapted is not None:
            self.adapted.update(totals)
        actions = self._act(step) if step % self.config.cure.every == 0 else []
        self._set_coefficients()
        return [self._event(action) for action in actions]

    def _act(self, step: int) -> list[Action]:
        done = []
        for policy in self.windowed:
            actions = policy.decide(policy.window.read())
            for action in actions:
                self._carry_out(action, step)
            done += actions
        return done

    def _carry_out(self, action: Action, step: int) -> None:
        if action.kind == RaiseBalance.name:
            return  # done by deciding
        parts = self.layers[action.layer]
        if action.kind == ResetBias.name:
            reset_bias(self.engine, parts)
        else:
            config = self.config.cure.revive_dead
            seed = mix64_int(mix64_int(self.config.train.seed) + step)
            revive(
                self.engine, parts, action.revivals, self.control,
                noise=config.noise, split=config.split, seed=seed,
            )  # fmt: skip
        for policy in self.windowed:
            policy.window.forget(action.layer)  # its loads were those of another layer

    def _set_coefficients(self) -> None:
        source = self.raised or self.adapted
        if source is not None:
            self.stepper.balance_L = source.coefficients()

    def _event(self, action: Action) -> dict[str, Any]:
        fields = asdict(action)
        fields.pop("revivals")
        number = self.numbers[action.layer]
        return {**fields, "layer": number, "message": f"layer {number}: {action.message}"}

    def metrics(self) -> dict[str, float]:
        """Of a logged step: the coefficient in force, where a policy sets it (a host sync)."""
        values: Sequence[float | Tensor] = self.stepper.balance_L or ()
        return {"moe/balance_coefficient": max(float(value) for value in values)} if values else {}

    def state_dict(self) -> dict[str, Any]:
        """What the policies have seen and set, JSON-able and exact."""
        return {policy.name: policy.state_dict() for policy in self._policies()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a policy that is new since then begins now."""
        for policy in self._policies():
            if policy.name in state:
                policy.load_state_dict(state[policy.name])
        self._set_coefficients()

    def _policies(self) -> list[Windowed | AdaptBalance]:
        return [*self.windowed, *([] if self.adapted is None else [self.adapted])]


def _biases(engine: Engine) -> list[Tensor]:
    routers = [module for module in engine.model.modules() if isinstance(module, Router)]
    return [router.bias_E for router in routers if router.bias_E is not None]


def build_cure(
    config: RunConfig, engine: Engine, stepper: Stepper, control: dist.ProcessGroup
) -> Cure | None:
    """What the config asks for; None where that is nothing."""
    return Cure(config, engine, stepper, control) if enabled(config.cure) else None
