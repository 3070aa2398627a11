"""`muster chaos` on nodes of their own network: one is lost with its memory, one link goes down for a while."""

from __future__ import annotations

import json

import pytest

from tests.chaos.test_chaos_command import chaos, verdict
from tests.cluster.hosts import need
from tests.command import Workplace
from tests.commands.watch import assert_nothing_left


@pytest.mark.long
def test_a_lost_node_and_a_link_that_comes_back(workplace: Workplace) -> None:
    need("ip", "unshare")
    schedule = workplace.path / "schedule.jsonl"
    faults = [
        {"step": 5, "rank": 1, "kind": "node-lost", "point": "backward"},
        {"step": 11, "rank": 0, "kind": "link-flap", "point": "forward"},
    ]
    schedule.write_text("".join(json.dumps(fault) + "\n" for fault in faults))
    nodes = ["chaos.nodes=2", "launcher.nproc_per_node=1", "resilience.node_timeout_seconds=5"]
    chaos(workplace, *nodes, "train.steps=16", f"chaos.schedule={schedule}")
    found = verdict(workplace, "a")
    assert (found["injected"], found["survived"], found["bit_identical"]) == (2, 2, True)
    assert (found["faults"][0]["detected"], found["commands"]) == ("node-lost", 1)
    assert_nothing_left(workplace)


@pytest.mark.long
def test_nodes_that_do_not_come_back(workplace: Workplace) -> None:
    """Three nodes become two; a fault that ends the command comes after it, so the two begin alone."""
    need("ip", "unshare")
    schedule = workplace.path / "schedule.jsonl"
    faults = [
        {"step": 4, "rank": 0, "kind": "node-gone", "point": "backward"},
        {"step": 9, "rank": 1, "kind": "kill", "point": "forward"},
        {"step": 13, "rank": 1, "kind": "preempt", "point": "forward"},
    ]
    schedule.write_text("".join(json.dumps(fault) + "\n" for fault in faults))
    nodes = [
        "chaos.nodes=3",
        "launcher.nproc_per_node=1",
        "parallel.ep=1",
        "resilience.node_timeout_seconds=5",
    ]
    waits = ["launcher.rejoin_seconds=1", "launcher.join_timeout_seconds=20", "train.global_batch=6"]
    output = chaos(workplace, *nodes, *waits, "train.steps=20", f"chaos.schedule={schedule}")
    found = verdict(workplace, "a")
    assert (found["injected"], found["survived"], found["equal"], found["commands"]) == (3, 3, True, 2)
    assert found["faults"][0]["detected"] == "node-lost" and "losses differ by up to" in output
    assert [event["world_size"] for event in workplace.events("start")] == [3, 2, 2, 2]
    assert_nothing_left(workplace)
