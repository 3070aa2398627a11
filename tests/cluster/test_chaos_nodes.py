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
