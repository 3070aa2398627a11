"""Alarms: what raises them, once an episode, with evidence and a remedy that exists."""

from __future__ import annotations

import json
import re

import pytest
import torch
from health_helpers import filled, moe_config, totals

from parallel.dispatch.all_to_all import AllToAllDispatcher
from parallel.dispatch.base import Routing
from trainer.config_moe import ExpertSize, LayoutConfig, RouterName
from trainer.health.alarms import Alarm, Alarms
from trainer.health.ranks import expert_ranks, rank_shares
from trainer.health.window import Window
from trainer.overrides import schema_types

EVEN, ONE = [2, 2, 2, 2], [8, 0, 0, 0]


def kinds(found: list[Alarm]) -> list[tuple[str, str]]:
    return [(alarm.kind, alarm.state) for alarm in found]


def test_an_episode_is_told_when_it_begins_and_when_it_ends() -> None:
    config = moe_config()
    config.health.dead_steps = 0
    window, alarms = Window(2, 8), Alarms(config, [3, 5])
    told: dict[int, list[Alarm]] = {}
    for step in range(1, 31):
        window.update(totals([EVEN, ONE if 5 <= step < 15 else EVEN]))
        told[step] = alarms.check(step, window.read())
    said = {step: kinds(found) for step, found in told.items() if found}
    assert list(said.values()) == [[("collapse", "raised")], [("collapse", "cleared")]]
    begin, end = said
    assert 5 <= begin <= 9 and 15 <= end <= 19
    raised, cleared = told[begin][0], told[end][0]
    assert raised.layers == [5] and raised.since == begin
    assert raised.evidence[0] | {"layer": 5, "experts": [0]} == raised.evidence[0]
    assert raised.evidence[0]["share"] > 0.8
    assert "layer 5: the load is that of" in raised.message and "expert 0" in raised.message
    assert "layout.balance.coefficient (now 0)" in raised.remedy
    assert cleared.layers == [] and cleared.since == begin and cleared.remedy == ""


def test_a_number_at_the_threshold_does_not_flutter() -> None:
    config = moe_config(num_experts=2)
    config.health.dead_steps, config.health.collapse = 0, 0.4
    alarms, said = Alarms(config, [0]), []
    for step in range(40):  # evenness 0.35 and 0.45 in turns: across the threshold, below its end at 0.6
        window = filled(config, [[93, 7] if step % 2 else [88, 12]])
        said += kinds(alarms.check(step, window.read()))
    assert said == [("collapse", "raised")]


def test_nothing_is_said_before_the_window_is_full() -> None:
    config = moe_config()
    window, alarms = Window(2, 8), Alarms(config, [0, 1])
    window.update(totals([ONE, ONE]))
    assert alarms.check(1, window.read()) == []
    window.update(totals([ONE, ONE]))
    assert kinds(alarms.check(2, window.read())) == [("collapse", "raised")]
    window.forget(0)
    window.update(totals([ONE, EVEN]))
    window.update(totals([ONE, EVEN]))
    assert alarms.check(4, window.read())[0].kind == "collapse"


def test_dead_experts_are_told_with_the_step_since() -> None:
    config = moe_config(top_k=2)
    window, alarms = Window(2, 8), Alarms(config, [0, 1])
    for step in range(1, 10):
        window.update(totals([[4, 4, 4, 4], [5, 5, 6, 0 if step > 2 else 1]]))
        found = alarms.check(step, window.read())
        if found:
            break
    assert (found[0].kind, step, found[0].since) == ("dead_experts", 7, 2)
    assert found[0].evidence == [{"layer": 1, "experts": [3], "num_dead": 1, "idle_steps": 5}]
    window.update(totals([[4, 4, 4, 4], [5, 5, 6, 1]]))
    assert kinds(alarms.check(8, window.read())) == [("dead_experts", "cleared")]


def test_entropy_that_is_low_and_entropy_that_falls() -> None:
    config = moe_config()
    found = Alarms(config, [0, 1]).check(60, filled(config, [EVEN, EVEN], [1.0, 0.01]).read())
    assert kinds(found) == [("entropy_low", "raised")] and found[0].layers == [1]
    window = filled(config, [EVEN, EVEN], [1.0, 1.0])
    for _ in range(3):
        window.update(totals([EVEN, EVEN], [1.0, 0.2]))
    assert kinds(Alarms(config, [0, 1]).check(63, window.read())) == [("entropy_fall", "raised")]
    config.layout.router = RouterName.hash  # one-hot by construction
    assert Alarms(config, [0, 1]).check(60, filled(config, [EVEN, EVEN], [0.0, 0.0]).read()) == []


def test_one_rank_starves_the_others() -> None:
    config = moe_config()
    config.health.collapse = 0.0
    counts = [[5, 5, 0, 0], [5, 1, 1, 3]]
    config.parallel.ep = 2
    config.health.dead_steps = 0
    found = Alarms(config, [0, 1]).check(60, filled(config, counts).read())
    assert kinds(found) == [("rank_starved", "raised")]
    assert found[0].evidence == [{"layer": 0, "experts": [0, 1], "rank": 0, "shares": [1.0, 0.0]}]
    config.layout.capacity_factor = 1.0  # buffers of one size: no rank has more to do
    config.health.drop_rate = 0.0
    assert Alarms(config, [0, 1]).check(60, filled(config, counts).read()) == []


def test_many_drops() -> None:
    config = moe_config()
    config.health.collapse = config.health.dead_steps = 0
    found = Alarms(config, [0, 1]).check(60, filled(config, [ONE, [2, 4, 1, 1]], dropped=True).read())
    assert kinds(found) == [("drops", "raised")] and found[0].layers == [0]
    assert found[0].evidence[0]["drop_rate"] == pytest.approx(0.5)
    assert "layout.capacity_factor" in found[0].remedy


def test_zero_switches_every_alarm_off() -> None:
    config = moe_config()
    config.parallel.ep = 2
    health = config.health
    health.collapse = health.entropy = health.entropy_fall = health.rank_max_over_mean = health.drop_rate = (
        0.0
    )
    health.dead_steps = 0
    assert Alarms(config, [0, 1]).check(60, filled(config, [ONE, ONE], [0.0, 0.0]).read()) == []


def test_remedies_name_fields_that_there_are() -> None:
    known = schema_types()
    config = moe_config()
    config.layout.router = RouterName.hash
    found = Alarms(config, [0, 1]).check(60, filled(config, [ONE, EVEN]).read())
    assert found[0].remedy.startswith("let a router that learns decide (layout.router=top_k)")
    for rate in (0.0, 0.001):
        config = moe_config()
        config.parallel.ep, config.layout.balance.bias_update_rate = 2, rate
        window = filled(config, [ONE, ONE], [0.0, 0.0], dropped=True)
        found = Alarms(config, [0, 1]).check(60, window.read())
        assert len(found) == 6, "every kind"
        for alarm in found:
            named = re.findall(r"[a-z]+\.[a-z_]+(?:\.[a-z_]+)*", alarm.remedy)
            assert named and set(named) <= set(known), alarm.remedy


def test_a_resumed_run_goes_on_with_what_was_open() -> None:
    config = moe_config()
    first, second = Alarms(config, [0, 1]), Alarms(config, [0, 1])
    window = filled(config, [ONE, EVEN])
    assert first.check(60, window.read())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.open == first.open
    assert second.check(70, window.read()) == [] == first.check(70, window.read())


def test_many_layers_are_one_alarm() -> None:
    config = moe_config()
    config.health.dead_steps = 0
    found = Alarms(config, list(range(60))).check(60, filled(config, [ONE] * 60).read())
    assert len(found) == 1 and len(found[0].evidence) == 60
    assert found[0].message.endswith("; and 56 more layers") and len(found[0].message) < 400


@pytest.mark.parametrize("sizes", [[], [(4, 8), (8, 4)]])
def test_experts_are_where_the_dispatcher_puts_them(sizes: list[tuple[int, int]]) -> None:
    layout = LayoutConfig(num_experts=12, expert_sizes=[ExpertSize(num=n, ffn_dim=w) for n, w in sizes])
    classes = tuple(n for n, _ in sizes) or (12,)
    for ep in (1, 2, 4):
        dispatcher = object.__new__(AllToAllDispatcher)
        dispatcher.ep = ep
        experts = torch.arange(12)[:, None]
        places = dispatcher._places(Routing(experts, torch.ones(12, 1), 12, class_sizes=classes))
        assert expert_ranks(layout, ep) == (places.flatten() // (12 // ep)).tolist()


def test_zero_and_copy_experts_are_on_no_rank() -> None:
    config = moe_config(num_experts=4)
    config.parallel.ep, config.layout.num_zero_experts = 2, 2
    shares = rank_shares(config, torch.tensor([[3, 0, 0, 1, 50, 50], [0, 0, 0, 0, 1, 1]]))
    assert shares is not None and shares.tolist() == [[0.75, 0.25], [0.5, 0.5]]
