"""Hosts of their own network come and go: the run shrinks, grows, is led by another, and ends as it should."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.conftest import RUN
from tests.cluster.hosts import Host, hosts, need
from tests.cluster.test_two_nodes import assert_same
from tests.command import MUSTER, SMALL, Workplace
from tests.commands.plugins import entry
from tests.commands.watch import assert_nothing_left, wait_until

TOLERANCE = 1e-5
QUICK = [
    *("launcher.master_addr=node-a", "launcher.nproc_per_node=1", "launcher.rejoin_seconds=1"),
    *("resilience.node_timeout_seconds=5", "eval.every=0"),
]


@pytest.fixture(scope="module")
def three() -> Iterator[list[Host]]:
    need("ip", "unshare")
    with hosts("node-a", "node-b", "node-c") as made:
        yield made


def start(workplace: Workplace, host: Host, *more: str) -> subprocess.Popen[str]:
    """`muster train` on one of the hosts."""
    data = f"data.path={workplace.path / 'corpus'}"
    return workplace.start(*host.command(MUSTER, "train", *SMALL, data, *RUN, *QUICK, *more))


def gate(workplace: Workplace, *steps: int, then: str = "") -> str:
    """The callbacks: rank 0 waits before each of the steps until ``go`` is said; and another one."""
    waits = entry("tests.cluster.plugins:Gate", folder=str(workplace.path), steps=list(steps))
    return f"callbacks=[{','.join(filter(None, [waits, then]))}]"


def reached(workplace: Workplace, step: int) -> None:
    wait_until((workplace.path / f"at-{step}").exists, f"step {step}")


def go(workplace: Workplace, step: int) -> None:
    (workplace.path / f"go-{step}").touch()


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def die(host: Host) -> None:
    """Every process of a host at once: the machine is gone."""
    for pid in host.processes():
        subprocess.run(["kill", "-KILL", str(pid)], capture_output=True)


def members(workplace: Workplace) -> list[tuple[str, str]]:
    return [(event["change"], event["host"]) for event in workplace.events("member")]


def assert_close(workplace: Workplace, calm: Workplace) -> None:
    """Every step once, and each loss that of the calm run up to the order of its sums."""
    found, wanted = workplace.losses(), calm.losses()
    assert found.keys() == wanted.keys()
    assert max(abs(found[step] - wanted[step]) / wanted[step] for step in wanted) < TOLERANCE


def test_a_run_goes_on_without_a_node_and_takes_it_in_again(
    workplace: Workplace, three: list[Host], calm: Workplace
) -> None:
    first, second, _ = three
    more = ["launcher.nnodes=1:2", gate(workplace, 5, 7, 10)]
    head, other = start(workplace, first, *more), start(workplace, second, *more)
    reached(workplace, 5)
    die(second)
    other.communicate()
    go(workplace, 5)
    reached(workplace, 7)  # alone
    back = start(workplace, second, *more)
    wait_until(lambda: ("back", "node-b") in members(workplace), "the node that came back")
    go(workplace, 7)
    wait_until(lambda: ("taken_in", "node-b") in members(workplace), "its work after the next checkpoint")
    go(workplace, 10)
    outputs = [finish(process) for process in (head, back)]
    assert members(workplace) == [("lost", "node-b"), ("back", "node-b"), ("taken_in", "node-b")], outputs
    assert [event["world_size"] for event in workplace.events("relayout")] == [1, 2]
    assert [event["world_size"] for event in workplace.events("start")] == [2, 1, 2]
    (failure,) = workplace.events("failure")
    assert (failure["kind"], failure["host"]) == ("node-lost", "node-b")
    assert len(workplace.events("regroup")) == 1
    assert len(list((workplace.run_dir / "configs").glob("0*.yaml"))) == 3
    assert_close(workplace, calm)
    assert_nothing_left(workplace)


def test_another_node_takes_over_from_node_0(
    workplace: Workplace, three: list[Host], calm: Workplace
) -> None:
    first, second, _ = three
    more = ["launcher.nnodes=1:2", gate(workplace, 5, 7, 10)]
    head, other = start(workplace, first, *more), start(workplace, second, *more)
    reached(workplace, 5)
    die(first)
    head.communicate()
    go(workplace, 5)
    reached(workplace, 7)
    back = start(workplace, first, *more)  # the very command that node 0 was started with
    wait_until(lambda: ("back", "node-a") in members(workplace), "the old node 0")
    go(workplace, 7)
    wait_until(lambda: ("taken_in", "node-a") in members(workplace), "its work after the next checkpoint")
    go(workplace, 10)
    outputs = [finish(process) for process in (other, back)]
    assert members(workplace) == [("lost", "node-a"), ("back", "node-a"), ("taken_in", "node-a")], outputs
    (leader,) = workplace.events("leader")
    assert (leader["host"], leader["term"]) == ("node-b", 2)
    (failure,) = workplace.events("failure")
    assert (failure["kind"], failure["rank"], failure["host"]) == ("node-lost", 0, "node-a")
    assert [event["world_size"] for event in workplace.events("start")] == [2, 1, 2]
    assert_close(workplace, calm)
    assert_nothing_left(workplace)


def test_spares_take_the_places_of_a_lost_node_and_of_a_repeat_offender(
    workplace: Workplace, three: list[Host], calm: Workplace
) -> None:
    first, second, third = three
    kills = {"folder": str(workplace.path / "marks"), "at": [[6, 1], [9, 1]], "every": 4}
    killer = entry("tests.chaos.plugins:KillAt", **kills)
    more = ["launcher.nnodes=2", "launcher.spares=1", "resilience.host_failures=2"]
    more.append(gate(workplace, 0, 5, then=killer))
    head, other = start(workplace, first, *more), start(workplace, second, *more)
    reached(workplace, 0)  # both work: who comes now is the spare
    spare = start(workplace, third, *more)
    go(workplace, 0)
    reached(workplace, 5)
    die(second)
    other.communicate()
    again = start(workplace, second, *more)  # a spare now
    go(workplace, 5)
    outputs = [finish(process) for process in (head, again)]
    assert spare.communicate()[0].count("failed too often within an hour") and spare.returncode == 70
    changes = [("lost", "node-b"), ("spare", "node-c"), ("excluded", "node-c"), ("spare", "node-b")]
    assert members(workplace) == changes, outputs
    assert not workplace.events("relayout")
    assert_same(workplace, calm)
