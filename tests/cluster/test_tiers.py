"""Two nodes with a memory of their own: one dies and takes it along; its state comes back from the other's."""

from __future__ import annotations

from launch.chaos.hosts import Host
from tests.cluster.test_two_nodes import assert_same, finish, held, train_on
from tests.command import Workplace
from tests.commands.watch import wait_until


def test_a_lost_nodes_state_comes_back_from_its_peer(
    workplace: Workplace, nodes: list[Host], calm: Workplace
) -> None:
    more = [
        *held(workplace, step=6, forever=True),
        "checkpoint.every=0",
        "checkpoint.memory_every=1",
        "resilience.node_timeout_seconds=5",
    ]
    first, second = (train_on(workplace, host, *more) for host in nodes)
    wait_until((workplace.path / "held").exists, "the middle of the run")
    second.kill()
    second.communicate()
    finish(train_on(workplace, nodes[1], *more), first)
    (resume,) = workplace.events("resume")
    # A snapshot that is on its way when its node dies is not yet safe; the one before it is.
    assert resume["tier"] == "peer" and resume["step"] in (5, 6), resume
    assert_same(workplace, calm)
