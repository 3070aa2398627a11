"""The bytes between ranks that the code predicts against those that real processes report."""

from __future__ import annotations

import pytest

from tests.distributed.cases import small_config
from tests.distributed.pool import Pool
from tests.distributed.traffic_cases import measured
from trainer.config import RunConfig
from trainer.models.cost import all_to_all_bytes_per_token

LENGTHS = {"ernie": 24, "hierarchical": 16, "skywork": 16, "moe_plus_plus": 22, "deepseek": 32}
"""Tokens of a row for which an even choice exists; 32 for the rest."""


def config_of(layout: str, world: int, ep: int, *overrides: str) -> RunConfig:
    length = f"train.seq_len={LENGTHS.get(layout, 32)}"
    ranks = [f"launcher.nproc_per_node={world}", f"parallel.ep={ep}"]
    return small_config(f"layout={layout}", "layout.balance.coefficient=0", length, *ranks, *overrides)


def predicted(config: RunConfig) -> float:
    tokens = config.train.global_batch * config.train.seq_len
    return all_to_all_bytes_per_token(config, config.parallel.ep) * tokens


@pytest.mark.parametrize(
    ("layout", "world", "ep"),
    [
        ("mixtral", 2, 2),
        ("mixtral", 4, 4),
        ("deepseek", 4, 2),
        ("ernie", 4, 4),
        ("hierarchical", 2, 2),
        ("moe_plus_plus", 4, 4),
        ("switch", 2, 2),
        ("gshard", 4, 4),
        ("expert_choice", 4, 2),
    ],
)
def test_an_even_choice_sends_what_is_predicted(layout: str, world: int, ep: int, pool: Pool) -> None:
    extra = ["layout.balance.router_z=0"] if layout == "expert_choice" else []
    config = config_of(layout, world, ep, *extra)
    assert pool.run(measured, world, config, 1, True) == [[predicted(config)]] * world


@pytest.mark.parametrize("layout", ["switch", "expert_choice"])
def test_with_a_capacity_any_choice_sends_what_is_predicted(layout: str, pool: Pool) -> None:
    config = config_of(layout, 4, 4)
    assert pool.run(measured, 4, config, 2, False) == [[predicted(config)] * 2] * 4


@pytest.mark.parametrize(("layout", "ep"), [("mixtral", 2), ("deepseek", 4)])
def test_a_routers_own_choice_sends_about_as_much(layout: str, ep: int, pool: Pool) -> None:
    """Untrained routers are uneven, yet each random token lives on any rank with equal probability."""
    config = config_of(layout, ep, ep, "train.seq_len=128")
    steps = 3
    found = sum(pool.run(measured, ep, config, steps, False)[0])
    leaving, tokens = (ep - 1) / ep, steps * config.train.global_batch * 128
    # Five deviations, if all choices of a token in all layers went the same way, which no choice exceeds.
    fluctuation = 5 * (leaving * (1 - leaving) / tokens) ** 0.5 / leaving
    assert found == pytest.approx(steps * predicted(config), rel=fluctuation) and fluctuation < 0.1
