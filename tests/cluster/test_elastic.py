"""Hosts of their own network come and go: the run shrinks, grows, is led by another, and ends as it should."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence

import pytest

from launch.chaos.hosts import Host, hosts
from tests.cluster.conftest import RUN
from tests.cluster.hosts import need
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


Running = dict[Host, "subprocess.Popen[str]"]
"""`muster train` by the host that it runs on."""


def start(workplace: Workplace, members: Sequence[Host], *more: str) -> Running:
    """`muster train` on hosts."""
    data = f"data.path={workplace.path / 'corpus'}"
    words = [MUSTER, "train", *SMALL, data, *RUN, *QUICK, *more]
    return {host: workplace.start(*host.command(*words)) for host in members}


def gate(workplace: Workplace, *steps: int, then: str = "") -> str:
    """The callbacks: rank 0 waits before each of the steps until ``go`` is said; and another one."""
    waits = entry("tests.cluster.plugins:Gate", folder=str(workplace.path), steps=list(steps))
    return f"callbacks=[{','.join(filter(None, [waits, then]))}]"


def reached(workplace: Workplace, step: int) -> None:
    wait_until((workplace.path / f"at-{step}").exists, f"step {step}")


def go(workplace: Workplace, step: int) -> None:
    (workplace.path / f"go-{step}").touch()


def hear(process: subprocess.Popen[str], text: str) -> None:
    """Wait until a command prints a line with this text."""
    assert process.stdout is not None
    assert any(text in line for line in process.stdout), f"it ended without a word of: {text}"


def finish(running: Running) -> list[str]:
    """What they printed, if all end well."""
    outputs = [process.communicate(timeout=600)[0] for process in running.values()]
    assert [process.returncode for process in running.values()] == [0] * len(running), "\n".join(outputs)
    return outputs


def lose(running: Running, host: Host) -> None:
    """Every process of a host dies at once: the machine is gone."""
    host.destroy()
    running.pop(host).communicate()


def members(workplace: Workplace) -> list[tuple[str, str]]:
    return [(event["change"], event["host"]) for event in workplace.events("member")]


def assert_close(workplace: Workplace, calm: Workplace) -> None:
    """Every step once, and each loss that of the calm run up to the order of its sums."""
    found, wanted = workplace.losses(), calm.losses()
    assert found.keys() == wanted.keys()
    assert max(abs(found[step] - wanted[step]) / wanted[step] for step in wanted) < TOLERANCE


def lose_and_take_in(workplace: Workplace, both: Sequence[Host], lost: Host) -> None:
    """A run of two nodes goes on with one, and from the next checkpoint on with both again, by the same command."""
    more = ["launcher.nnodes=1:2", gate(workplace, 5, 7, 10)]
    running = start(workplace, both, *more)
    reached(workplace, 5)
    lose(running, lost)
    go(workplace, 5)
    reached(workplace, 7)  # alone
    running |= start(workplace, [lost], *more)
    wait_until(lambda: ("back", lost.name) in members(workplace), f"the return of {lost.name}")
    go(workplace, 7)
    wait_until(lambda: ("taken_in", lost.name) in members(workplace), "its work after the next checkpoint")
    go(workplace, 10)
    outputs = finish(running)
    changes = [("lost", lost.name), ("back", lost.name), ("taken_in", lost.name)]
    assert members(workplace) == changes, outputs
    (failure,) = workplace.events("failure")
    assert (failure["kind"], failure["host"]) == ("node-lost", lost.name)
    assert [event["world_size"] for event in workplace.events("relayout")] == [1, 2]
    assert [event["world_size"] for event in workplace.events("start")] == [2, 1, 2]


@pytest.mark.long
def test_a_run_goes_on_without_a_node_and_takes_it_in_again(
    workplace: Workplace, three: list[Host], calm: Workplace
) -> None:
    lose_and_take_in(workplace, three[:2], lost=three[1])
    assert not workplace.events("leader")
    assert len(workplace.events("regroup")) == 1
    assert len(list((workplace.run_dir / "configs").glob("0*.yaml"))) == 3
    assert_close(workplace, calm)
    assert_nothing_left(workplace)


def test_another_node_takes_over_from_node_0(
    workplace: Workplace, three: list[Host], calm: Workplace
) -> None:
    lose_and_take_in(workplace, three[:2], lost=three[0])
    (leader,) = workplace.events("leader")
    assert (leader["host"], leader["term"]) == ("node-b", 2)
    assert workplace.events("failure")[0]["rank"] == 0
    assert_close(workplace, calm)
    assert_nothing_left(workplace)


@pytest.mark.long
def test_spares_take_the_places_of_a_lost_node_and_of_a_repeat_offender(
    workplace: Workplace, three: list[Host], calm: Workplace
) -> None:
    first, second, third = three
    kills = {"folder": str(workplace.path / "marks"), "at": [[6, 1], [9, 1]], "every": 4}
    killer = entry("tests.chaos.plugins:KillAt", **kills)
    more = ["launcher.nnodes=2", "launcher.spares=1", "resilience.host_failures=2"]
    more.append(gate(workplace, 0, 5, then=killer))
    running = start(workplace, [first, second], *more)
    reached(workplace, 0)  # both work: who comes now is the spare
    spare = start(workplace, [third], *more)[third]
    hear(running[first], "node-c is here: a spare")
    go(workplace, 0)
    reached(workplace, 5)
    lose(running, second)
    running |= start(workplace, [second], *more)  # a spare now
    go(workplace, 5)
    outputs = finish(running)
    assert spare.communicate()[0].count("failed too often within an hour") and spare.returncode == 70
    changes = [("lost", "node-b"), ("spare", "node-c"), ("excluded", "node-c"), ("spare", "node-b")]
    assert members(workplace) == changes, outputs
    assert not workplace.events("relayout")
    assert_same(workplace, calm)
