"""`muster chaos` on nodes of their own network: some are lost with their memory, one link goes down for a while."""

from __future__ import annotations

import pytest

from tests.chaos.test_chaos_command import chaos, verdict, write_schedule
from tests.cluster.hosts import need
from tests.command import Workplace
from tests.commands.watch import assert_nothing_left

NODES = ["launcher.nproc_per_node=1", "resilience.node_timeout_seconds=5"]


@pytest.mark.long
def test_a_lost_node_and_a_link_that_comes_back(workplace: Workplace) -> None:
    need("ip", "unshare")
    schedule = write_schedule(
        workplace,
        (4, 1, "node-lost", "backward"),
        (8, 0, "agent-kill", "forward"),
        (12, 0, "link-flap", "forward"),
    )
    chaos(workplace, *NODES, "chaos.nodes=2", "train.steps=17", f"chaos.schedule={schedule}")
    found = verdict(workplace, "a")
    assert (found["injected"], found["survived"], found["bit_identical"]) == (3, 3, True)
    assert [fault["detected"] for fault in found["faults"][:2]] == ["node-lost", "node-lost"]
    assert found["commands"] == 1, "a node whose agent was killed runs its command again, beside the other"
    assert_nothing_left(workplace)


@pytest.mark.long
def test_nodes_that_do_not_come_back(workplace: Workplace) -> None:
    """Three nodes become two; a fault that ends the command comes after it, so the two begin alone."""
    need("ip", "unshare")
    schedule = write_schedule(
        workplace, (4, 0, "node-gone", "backward"), (9, 1, "kill", "forward"), (13, 1, "preempt", "forward")
    )
    waits = ["launcher.rejoin_seconds=1", "launcher.join_timeout_seconds=20"]
    layout = ["chaos.nodes=3", "parallel.ep=1", "parallel.dp_shard=1", "parallel.dp_replicate=3"]
    output = chaos(
        workplace,
        *NODES,
        *waits,
        *layout,
        "train.global_batch=6",
        "train.steps=20",
        f"chaos.schedule={schedule}",
    )
    found = verdict(workplace, "a")
    assert (found["injected"], found["survived"], found["equal"], found["commands"]) == (3, 3, True, 2)
    assert found["faults"][0]["detected"] == "node-lost" and "losses differ by up to" in output
    assert [event["world_size"] for event in workplace.events("start")] == [3, 2, 2, 2]
    assert_nothing_left(workplace)
