"""The rules of the section ``cure``. Reads only; torch-free."""

from __future__ import annotations

from trainer.config import RunConfig, require
from trainer.config_moe import BalanceScope, CureConfig, RouterName


def enabled(cure: CureConfig) -> list[str]:
    """Names of the policies that are on."""
    sections = ("raise_balance", "adapt_balance", "revive_dead", "reset_bias")
    return [name for name in sections if getattr(cure, name).enabled]


def check_cure(config: RunConfig) -> None:
    """Check what is to be done about uneven and dead experts.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    cure = config.cure
    _check_ranges(cure)
    for name in enabled(cure):
        field = f"cure.{name}.enabled"
        off = f"{field}=false"
        require(
            config.layout.num_experts > 0,
            field,
            True,
            f"layout={config.layout.name} has no experts to cure",
            f"{off}, or a layout with experts (layout=mixtral)",
        )
        for target in ("model.target", "layout.target"):
            section = getattr(config, target.partition(".")[0])
            relation = f"{target}={section.target} makes layers of your own, whose routers are not known"
            require(section.target is None, field, True, relation, off)
        _CHECKS[name](config, field, off)


def _check_ranges(cure: CureConfig) -> None:
    raised, adapted, revived, reset = (
        cure.raise_balance,
        cure.adapt_balance,
        cure.revive_dead,
        cure.reset_bias,
    )
    at_least = [
        ("every", cure.every, 1),
        ("raise_balance.patience", raised.patience, 1),
        ("raise_balance.even", raised.even, 1.0),
        ("raise_balance.threshold", raised.threshold, raised.even),
        ("raise_balance.limit", raised.limit, 1.0),
        ("adapt_balance.sensitivity", adapted.sensitivity, 0.0),
        ("adapt_balance.maximum", adapted.maximum, 0.0),
        ("revive_dead.patience", revived.patience, 1),
        ("revive_dead.max_at_once", revived.max_at_once, 1),
        ("revive_dead.threshold", revived.threshold, 0.0),
        ("revive_dead.noise", revived.noise, 0.0),
        ("reset_bias.patience", reset.patience, 1),
        ("reset_bias.threshold", reset.threshold, 1.0),
        ("reset_bias.spread", reset.spread, 0.0),
    ]
    for name, value, least in at_least:
        what = "cure.raise_balance.even = " if name == "raise_balance.threshold" else ""
        require(
            value >= least, f"cure.{name}", value, f"must be at least {what}{least}", f"cure.{name}={least}"
        )
    for name, value in (
        ("revive_dead.threshold", revived.threshold),
        ("adapt_balance.decay", adapted.decay),
    ):
        require(0 <= value < 1, f"cure.{name}", value, "must be in [0, 1)", f"cure.{name}=0.01")
    factor = raised.factor
    require(factor > 1, "cure.raise_balance.factor", factor, "must be above 1", "cure.raise_balance.factor=2")
    require(
        revived.split > 0,
        "cure.revive_dead.split",
        revived.split,
        "two equal rows of the router tie, and a tie always goes to the same of the two experts",
        "cure.revive_dead.split=0.1",
    )


def _check_raise(config: RunConfig, field: str, off: str) -> None:
    coefficient = config.layout.balance.coefficient
    relation = f"layout.balance.coefficient = {coefficient:g} stays 0 whatever it is multiplied by"
    require(coefficient > 0, field, True, relation, f"layout.balance.coefficient=0.001, or {off}")
    require(
        not config.cure.adapt_balance.enabled,
        field,
        True,
        "cure.adapt_balance sets the same coefficient",
        f"{off}, or cure.adapt_balance.enabled=false",
    )


def _check_learnt(config: RunConfig, field: str, off: str) -> None:
    router = config.layout.router
    why = {
        RouterName.expert_choice: "gives every expert the same load",
        RouterName.hash: "learns nothing that could be changed",
    }
    require(router not in why, field, True, f"layout.router={router.value} {why.get(router, '')}", off)


def _check_adapt(config: RunConfig, field: str, off: str) -> None:
    _check_learnt(config, field, off)
    scope = config.layout.balance.scope
    relation = "layout.balance.scope=micro counts otherwise on every split into micro-batches"
    require(scope is not BalanceScope.micro, field, True, relation, f"layout.balance.scope=step, or {off}")


def _check_bias(config: RunConfig, field: str, off: str) -> None:
    rate = config.layout.balance.bias_update_rate
    relation = f"layout={config.layout.name} has no bias (layout.balance.bias_update_rate = {rate:g})"
    require(rate > 0, field, True, relation, f"{off}, or layout=deepseek")


_CHECKS = {
    "raise_balance": _check_raise,
    "adapt_balance": _check_adapt,
    "revive_dead": _check_learnt,
    "reset_bias": _check_bias,
}
