"""The bytes between ranks that the code predicts against those that real processes report."""

from __future__ import annotations

import pytest

from tests.distributed.cases import small_config
from tests.distributed.pool import Pool
from tests.distributed.traffic_cases import measured
from trainer.config import RunConfig
from trainer.models.cost import all_to_all_bytes_per_token, ranks_visited

LENGTHS = {"ernie": 24, "hierarchical": 16, "skywork": 16, "moe_plus_plus": 22, "deepseek": 32}
"""Tokens of a row for which an even choice exists; 32 for the rest."""


def config_of(layout: str, world: int, ep: int, *overrides: str) -> RunConfig:
    length = f"train.seq_len={LENGTHS.get(layout, 32)}"
    ranks = [f"launcher.nproc_per_node={world}", f"parallel.ep={ep}"]
    return small_config(f"layout={layout}", "layout.balance.coefficient=0", length, *ranks, *overrides)


def predicted(config: RunConfig) -> float:
    """Of one step."""
    tokens = config.train.global_batch * config.train.seq_len
    return all_to_all_bytes_per_token(config, config.parallel.ep) * tokens


def bytes_of_visit(config: RunConfig) -> int:
    """Four trips of a token, with weights and experts on the first and the weights' gradients on the last."""
    number, choices = 2 if config.train.dtype.value == "bf16" else 4, config.layout.top_k
    there = round_up(config.model.dim * number) + round_up(choices * (4 + 4))
    home = round_up(config.model.dim * number) + round_up(choices * 4)
    return there + home + 2 * config.model.dim * number


def round_up(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(
    ("layout", "world", "ep", "overrides"),
    [
        ("mixtral", 2, 2, []),
        ("mixtral", 4, 4, ["train.dtype=bf16"]),
        ("deepseek", 4, 2, []),
        ("ernie", 4, 4, []),
        ("hierarchical", 2, 2, []),
        ("moe_plus_plus", 4, 4, []),
    ],
)
def test_a_token_goes_once_to_each_rank_of_its_choice(
    layout: str, world: int, ep: int, overrides: list[str], even: bool, pool: Pool
) -> None:
    config = config_of(layout, world, ep, *overrides)
    for found in pool.run(measured, world, config, 2, even):
        assert found["bytes"] == found["visits"] * bytes_of_visit(config) > 0


@pytest.mark.parametrize(("layout", "world", "ep"), [("mixtral", 2, 2), ("moe_plus_plus", 4, 4)])
def test_with_a_budget_a_row_goes_to_each_choice(layout: str, world: int, ep: int, pool: Pool) -> None:
    config = config_of(layout, world, ep, "parallel.max_tokens_in_flight=100000")
    for found in pool.run(measured, world, config, 1, True):
        assert found["bytes"] == found["choices"] * 4 * config.model.dim * 4 == predicted(config)


@pytest.mark.parametrize("layout", ["switch", "gshard", "expert_choice"])
def test_with_a_capacity_any_choice_sends_what_is_predicted(layout: str, pool: Pool) -> None:
    config = config_of(layout, 4, 4, "layout.balance.router_z=0")
    assert [found["bytes"] for found in pool.run(measured, 4, config, 2, False)] == [
        2 * predicted(config)
    ] * 4


@pytest.mark.parametrize(("layout", "ep"), [("mixtral", 2), ("deepseek", 4)])
def test_a_routers_own_choice_sends_about_as_much(layout: str, ep: int, pool: Pool) -> None:
    """Experts that are liked more than others are on fewer ranks: never much more than an even choice reaches."""
    config = config_of(layout, ep, ep, "train.seq_len=128")
    steps = 3
    found = pool.run(measured, ep, config, steps, False)[0]["bytes"]
    leaving, tokens = (ep - 1) / ep, steps * config.train.global_batch * 128
    # Five deviations of the share that leaves, if all choices of a token in all layers went the same way.
    fluctuation = 5 * (leaving * (1 - leaving) / tokens) ** 0.5 / leaving
    fewest = 1 / ranks_visited(config.layout, ep)
    assert fewest - fluctuation < found / (steps * predicted(config)) < 1 + fluctuation
