"""What the policies decide from loads: numbers in, actions out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from trainer.config_moe import AdaptBalanceConfig, RaiseBalanceConfig, ResetBiasConfig, ReviveDeadConfig
from trainer.cure.policies import Action, AdaptBalance, RaiseBalance, ResetBias, ReviveDead
from trainer.health.window import Window
from trainer.moe.surgery import MoeParts, Revival, Stack
from trainer.step import Totals

EVEN = [10, 10, 10, 10]
HOT = [34, 2, 2, 2]


def totals(counts: list[list[int]], dropped: int = 0) -> Totals:
    counts_LE = torch.tensor(counts)
    zeros = torch.zeros(len(counts), dtype=torch.float64)
    dropped_L = torch.full((len(counts),), dropped)
    none = zeros.long()
    return Totals(40, zeros.sum(), zeros, zeros, zeros, zeros, dropped_L, none, none, counts_LE)


def parts(num: int = 4, peers: int = 4, sizes: tuple[int, ...] = ()) -> MoeParts:
    stacks, first = [], 0
    for index, size in enumerate(sizes or (num,)):
        stacks.append(Stack((f"experts.sizes.{index}.w1",), first, size))
        first += size
    return MoeParts("", tuple(stacks), ("router.weight",), None, peers)


def follow(policy: Any, steps: list[list[list[int]]]) -> list[tuple[int, Action]]:
    """Steps through the policy's window; (step, action) of all that it decides."""
    found = []
    for step, counts in enumerate(steps, start=1):
        policy.window.update(totals(counts))
        actions = policy.decide(policy.window.read())
        for action in actions:
            if action.kind != "raise_balance":
                policy.window.forget(action.layer)
        found += [(step, action) for action in actions]
    return found


def raising(**changes: Any) -> RaiseBalance:
    config = RaiseBalanceConfig(enabled=True, patience=3, limit=6.0, **changes)
    return RaiseBalance(config, 0.01, Window(3, 40), num_layers=2)


def test_a_coefficient_goes_up_to_its_limit_and_back_down() -> None:
    policy = raising()
    up = follow(policy, [[EVEN, HOT]] * 14)
    assert [(step, action.layer) for step, action in up] == [(3, 1), (6, 1), (9, 1)], "and no further"
    assert [action.after for _, action in up] == pytest.approx([0.02, 0.04, 0.06])
    assert policy.coefficients() == pytest.approx([0.01, 0.06])
    down = follow(policy, [[EVEN, EVEN]] * 30)
    assert [action.after for _, action in down] == pytest.approx([0.04, 0.02, 0.01])
    assert policy.coefficients() == [0.01, 0.01]
    assert up[0][1].evidence["max_over_mean"] == pytest.approx(3.4)
    assert "uneven: balance coefficient 0.01 → 0.02" in up[0][1].message


def test_between_even_and_uneven_nothing_changes() -> None:
    policy = raising()
    follow(policy, [[EVEN, HOT]] * 3)
    assert follow(policy, [[EVEN, [17, 9, 7, 7]]] * 20) == []  # 1.7 times the mean
    assert policy.level_L == [0, 1]


def test_what_was_seen_goes_through_json() -> None:
    """Interrupted anywhere, the same actions at the same steps."""
    story = [[EVEN, HOT]] * 5 + [[HOT, EVEN]] * 9 + [[EVEN, EVEN]] * 9
    whole = [(step, action.layer, action.after) for step, action in follow(raising(), story)]
    assert len(whole) >= 6
    for cut in range(1, len(story)):
        policy = raising()
        before = follow(policy, story[:cut])
        state = json.loads(json.dumps(policy.state_dict()))
        policy = raising()
        policy.load_state_dict(state)
        after = [(step + cut, action) for step, action in follow(policy, story[cut:])]
        assert [(step, a.layer, a.after) for step, a in before + after] == whole


def reviving(layer: MoeParts, **changes: Any) -> ReviveDead:
    config = ReviveDeadConfig(enabled=True, patience=3, **changes)
    return ReviveDead(config, Window(3, 40), [layer])


@pytest.mark.parametrize(
    ("layer", "counts", "expected"),
    [
        (parts(), [0, 30, 10, 0], [(0, 1), (3, 1)]),
        (parts(), [0, 22, 18, 0], [(0, 1), (3, 2)]),  # half of 22 is less than 18
        (parts(), [0, 20, 20, 0], [(0, 1), (3, 2)]),  # a tie: the lower one
        (parts(peers=2), [0, 9, 31, 0], [(3, 2)]),  # nobody busy among the peers of 0
        (parts(sizes=(2, 2)), [31, 9, 0, 0], []),  # the busy ones have another width
        (parts(sizes=(1, 3)), [0, 31, 9, 0], [(3, 1)]),
        (parts(num=3), [0, 30, 10, 0], [(0, 1)]),  # the last one is a zero expert
        (parts(), [13, 13, 13, 1], []),  # hardly used is not dead
        (parts(), EVEN, []),
    ],
)
def test_who_is_made_from_whom(layer: MoeParts, counts: list[int], expected: list[tuple[int, int]]) -> None:
    found = follow(reviving(layer), [[counts]] * 4)
    assert {step for step, _ in found} <= {3}, "not before, and not again at once"
    revivals = [revival for _, action in found for revival in action.revivals]
    assert revivals == [Revival(*pair) for pair in expected]


def test_an_expert_that_died_is_found_before_the_mean_has_forgotten_it() -> None:
    story = [[EVEN]] * 20 + [[[20, 20, 0, 0]]] * 6
    assert [step for step, _ in follow(reviving(parts()), story)] == [23, 26]


def test_next_to_nothing_on_average_is_dead_too() -> None:
    story = [[[2000, 1999, 0, 1]]] * 3
    [(_, action)] = follow(reviving(parts()), story)
    assert action.experts == [2, 3]
    assert follow(reviving(parts(), threshold=0.0001), story)[0][1].experts == [2]


def test_no_more_at_once_than_allowed_and_the_worst_layer_first() -> None:
    policy = ReviveDead(
        ReviveDeadConfig(enabled=True, patience=2, max_at_once=2), Window(2, 40), [parts(), parts()]
    )
    story = [[[30, 10, 0, 10], [40, 0, 0, 0]]] * 4
    found = [(step, action.layer, action.experts) for step, action in follow(policy, story)]
    assert found == [(2, 1, [1, 2]), (3, 0, [2]), (4, 1, [1, 2])]


def test_a_bias_is_reset_where_it_ran_away_and_the_loads_with_it() -> None:
    calm, wild = torch.tensor([0.1, -0.1, 0.0, 0.0]), torch.tensor([5.0, 0.0, 0.0, -0.5])
    policy = ResetBias(ResetBiasConfig(enabled=True, patience=3), Window(3, 40), [calm, wild, wild])
    [(step, action)] = follow(policy, [[HOT, HOT, EVEN]] * 4)
    assert (step, action.layer, action.before, action.after) == (3, 1, 5.5, 0.0)


def test_the_coefficient_that_follows_the_drops() -> None:
    """Skywork-MoE's equations 7 to 9, one step by hand."""
    config = AdaptBalanceConfig(enabled=True, sensitivity=0.2, maximum=0.05, decay=0.9)
    policy = AdaptBalance(config, 0.01, has_capacity=False, num_layers=2)
    policy.update(totals([EVEN, HOT]))  # HOT: 24 of 40 pairs are above the mean of 10
    assert policy.value_L.tolist() == pytest.approx([0.009, 0.9 * 0.01 + 0.1 * 0.05])
    with_capacity = AdaptBalance(config, 0.01, has_capacity=True, num_layers=1)
    with_capacity.update(totals([HOT], dropped=4))
    assert with_capacity.value_L.tolist() == pytest.approx([0.9 * 0.01 + 0.1 * 0.2 * 0.1])
    assert all(value.dtype == torch.float32 for value in with_capacity.coefficients())  # type: ignore[union-attr]
