"""What cannot be cured is said at once, with the field and the fix."""

from __future__ import annotations

import re

import pytest

from parallel.errors import ConfigError
from tests.configs import composed
from trainer.config import Machine, RunConfig, resolve
from trainer.cure.rules import enabled
from trainer.proof.shrink import shrink
from trainer.rules import validate


def checked(*overrides: str) -> RunConfig:
    config = resolve(composed("device=cpu", *overrides), Machine(num_cpus=2))
    validate(config)
    return config


RAISE, ADAPT = "cure.raise_balance.enabled=true", "cure.adapt_balance.enabled=true"
REVIVE, RESET = "cure.revive_dead.enabled=true", "cure.reset_bias.enabled=true"
MISTAKES = [
    (["layout=dense", REVIVE], "cure.revive_dead.enabled=True: layout=dense has no experts to cure"),
    (["layout.target=a.b:C", REVIVE], "layout.target=a.b:C makes layers of your own, whose routers are not"),
    (
        ["layout.balance.coefficient=0", RAISE],
        "stays 0 whatever it is multiplied by. Fix: layout.balance.coe",
    ),
    ([RAISE, ADAPT], "cure.adapt_balance sets the same coefficient"),
    (["layout.balance.scope=micro", ADAPT], "layout.balance.scope=micro counts otherwise on every split"),
    (
        ["layout=hash", REVIVE],
        "layout.router=hash learns nothing that could be changed. Fix: cure.revive_dead",
    ),
    (["layout=expert_choice", REVIVE], "layout.router=expert_choice gives every expert the same load"),
    ([RESET], "layout=mixtral has no bias (layout.balance.bias_update_rate = 0)"),
    (
        ["cure.revive_dead.split=0"],
        "a tie always goes to the same of the two experts. Fix: cure.revive_dead.s",
    ),
    (["cure.raise_balance.factor=1"], "cure.raise_balance.factor=1.0: must be above 1"),
    (["cure.raise_balance.threshold=1.1"], "must be at least cure.raise_balance.even = 1.25"),
    (["cure.every=0"], "cure.every=0: must be at least 1. Fix: cure.every=1"),
    (["cure.revive_dead.patience=0"], "cure.revive_dead.patience=0: must be at least 1"),
    (["cure.adapt_balance.decay=1"], "cure.adapt_balance.decay=1.0: must be in [0, 1)"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        checked(*overrides)


def test_what_is_on() -> None:
    assert enabled(checked().cure) == []
    assert enabled(checked("cure=standard").cure) == ["raise_balance", "revive_dead"]
    assert enabled(checked("layout=deepseek", RESET).cure) == ["reset_bias"]


def test_a_proof_is_of_the_layout_alone() -> None:
    from trainer.config import CallbackConfig, Device

    run, changed = shrink(checked("cure=standard"), Device.cpu, CallbackConfig("a:b"))
    assert enabled(run.cure) == []
    assert "cure.revive_dead.enabled" in {change.field for change in changed}
