"""Node 0 and the others over a real store on this machine: who is let in, who is missed, and how all end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console

from launch.agent import Incomplete
from launch.charge import Deposed
from launch.cluster import Cluster
from launch.control import Hello, Link, Order, Status
from launch.failure import Failure
from launch.follower import Follower
from launch.outcome import Outcome
from parallel.errors import ConfigError
from trainer.config import Device, Machine, RunConfig, resolve
from trainer.metrics.jsonl import read_events
from trainer.rundir import RunDirectory

PATIENCE_SECONDS = 30.0
ASKED = {"optim.lr": 0.001, "train.steps": 5}
CODE = {"host": "h0", "torch": "2.13.0", "muster code": "abc"}


def hello(host: str, node_rank: int | None = None, **changes: object) -> Hello:
    values = {"num_workers": 2, "device": "cpu", "fingerprint": {**CODE, "host": host}, "asked": ASKED}
    return Hello(host, node_rank, **{**values, **changes})  # type: ignore[arg-type]


class Nodes:
    """A cluster, and links of other nodes in this process."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.links: list[Link] = []

    def lead(self, nnodes: int | str, **limits: float) -> Cluster:
        config = RunConfig()
        config.launcher.nnodes = nnodes
        config.launcher.join_timeout_seconds = limits.get("join", PATIENCE_SECONDS)
        config.resilience.node_timeout_seconds = limits.get("silence", PATIENCE_SECONDS)
        config.resilience.host_failures = 1
        config.launcher.spares = int(limits.get("spares", 0))
        self.config = config
        return Cluster(self.store, hello("h0", 0), config, say=lambda line: None)

    def join(self, host: str, node_rank: int | None = None, **changes: object) -> Link:
        client = dist.TCPStore("127.0.0.1", self.store.port, is_master=False, wait_for_workers=False)
        link = Link(client, hello(host, node_rank, **changes), 2, PATIENCE_SECONDS)
        self.links.append(link)
        return link


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    for link in made.links:
        link.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def next_order(link: Link) -> Order:
    until(lambda: link.orders)
    return link.orders.popleft()


def ranks(cluster: Cluster) -> dict[str, int]:
    return {member.hello.host: member.node_rank for member in cluster.members.values()}


def test_ranks_are_those_given_and_else_in_order_of_arrival(nodes: Nodes) -> None:
    cluster = nodes.lead(4)
    nodes.join("given", 2)
    cluster.poll()
    for host in ("first", "second"):
        nodes.join(host)
        until(lambda: (cluster.poll(), len(cluster.members) == len(nodes.links))[1])
    cluster.gather()
    assert ranks(cluster) == {"given": 2, "first": 1, "second": 3}


def test_many_nodes(nodes: Nodes) -> None:
    cluster = nodes.lead(17)
    for number in range(16):
        nodes.join(f"h{number + 1}")
    cluster.gather()
    assert sorted(ranks(cluster).values()) == list(range(1, 17))
    cluster.order("terminate")
    assert all(next_order(link).do == "terminate" for link in nodes.links)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": {**CODE, "host": "b", "torch": "2.11.0"}}, "torch is 2.11.0 on b and 2.13.0 on h0"),
        ({"fingerprint": {**CODE, "host": "b", "muster code": "x"}}, "muster code is x on b and abc on h0"),
        ({"asked": {**ASKED, "optim.lr": 0.1}}, "optim.lr is 0.1 there and 0.001 here"),
        ({"num_workers": 4}, "launcher.nproc_per_node=4: on b, but 2 on h0"),
        ({"device": "cuda"}, "device=cuda: on b, but cpu on h0"),
        ({"node_rank": 0}, "h0 and b both call themselves node 0"),
    ],
)
def test_a_node_that_is_not_alike_is_named(nodes: Nodes, changes: dict, said: str) -> None:
    cluster = nodes.lead(2)
    link = nodes.join("b", **changes)
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        cluster.gather()
    link.tell(Status(left=True))  # so that nobody waits for its answer
    cluster.dismiss(Outcome(2, "why"))
    order = next_order(link)
    assert (order.do, order.code, order.message, str(link.id) in order.ranks) == ("leave", 2, "why", True)


def test_one_node_too_many(nodes: Nodes) -> None:
    cluster = nodes.lead(2)
    for host in ("b", "c"):
        nodes.join(host)
    with pytest.raises(ConfigError, match="is one node too many: there are h0, b"):
        until(lambda: cluster.poll())


def test_who_does_not_come_is_told(nodes: Nodes) -> None:
    cluster = nodes.lead(3, join=0.3)
    nodes.join("b")
    with pytest.raises(Incomplete, match=r"without node 2 of 3 \(here: 0 \(h0\), 1 \(b\)\)"):
        cluster.gather()


def test_a_silent_node_is_lost_and_another_takes_its_place(nodes: Nodes, tmp_path) -> None:
    cluster = nodes.lead(2, silence=0.6)
    old = nodes.join("b")
    cluster.gather()
    old.tell(Status(ready=True))
    cluster.assemble(tmp_path)
    old.close()
    new = nodes.join("b", asked={})  # it was started when the run's config was another already
    cluster.poll()
    assert ranks(cluster) == {"b": 1} and list(cluster.members) == [old.id], "the old one is not lost yet"
    until(lambda: (cluster.poll(), cluster.members[old.id].lost)[1])
    new.tell(Status(ready=True))
    cluster.assemble(tmp_path)
    assert list(cluster.members) == [new.id]


def test_a_failure_is_told_by_its_age(nodes: Nodes) -> None:
    """The other node's clock is an hour slow."""
    cluster = nodes.lead(2)
    link = nodes.join("b")
    cluster.gather()
    then = time.time() - 3600
    failure = Failure(2, "b", "crash", "killed", -9, then, True, "", "", then)
    link.tell(Status(generation=0, codes=[-9, None], failure=failure, failure_age=0.5))
    (member,) = cluster.members.values()
    until(lambda: (cluster.poll(), member.failure is not None)[1])
    assert member.failure is not None
    assert abs(time.time() - 0.5 - member.failure.time) < PATIENCE_SECONDS
    assert member.status.codes == [-9, None]


def test_a_node_that_wants_to_stop_is_heard_while_waiting(nodes: Nodes) -> None:
    cluster = nodes.lead(3)
    link = nodes.join("b")
    link.tell(Status(stopping="SIGTERM"))
    with pytest.raises(Incomplete) as caught:
        cluster.gather()
    assert caught.value.stopped and cluster.asked_to_stop() == "SIGTERM on node 1 (b)"


def test_node_0_that_dies_is_noticed(nodes: Nodes) -> None:
    link = nodes.join("b")
    del nodes.store
    until(lambda: link.lost is not None)


def test_the_last_word_of_node_0_counts_though_it_is_gone(nodes: Nodes) -> None:
    cluster = nodes.lead(2)
    link = nodes.join("b")
    cluster.gather()
    cluster.order("leave", ranks={str(link.id): -1}, code=75, message="Stopped and saved.")
    until(lambda: link.orders)
    del nodes.store, cluster
    until(lambda: link.lost is not None)
    assert Follower(link, ("a", 1), Console()).run() == Outcome(75, "Stopped and saved.")


def begun(cluster: Cluster, nodes: Nodes, folder: Path) -> Callable[[], list[tuple[str, str]]]:
    """The cluster in charge of a run, with everyone ready; gives what is told of members."""
    run = RunDirectory(folder / "runs" / "e2e" / "a")
    nodes.config.run.root, nodes.config.run.name, nodes.config.run.id = str(folder / "runs"), "e2e", "a"
    nodes.config.launcher.nproc_per_node = nodes.config.train.num_threads = 1
    nodes.config.device = Device.cpu
    config = resolve(nodes.config, Machine(num_cpus=1))
    run.freeze(config)
    cluster.begin(run, config)
    for link in nodes.links:
        link.tell(Status(ready=True))
    cluster.assemble(run.path)
    events = run.path / "events.jsonl"
    return lambda: [(e["change"], e["host"]) for e in read_events(events) if e["event"] == "member"]


def failed(host: str, kind: str = "crash") -> Failure:
    return Failure(1, host, kind, "why", 1, time.time(), True, "", "", time.time())


def test_a_spare_is_announced_as_one_even_if_it_comes_when_the_seat_is_free(
    nodes: Nodes, tmp_path: Path
) -> None:
    cluster = nodes.lead(2, spares=1)
    old = nodes.join("b")
    told = begun(cluster, nodes, tmp_path)
    new = nodes.join("c")
    new.tell(Status(ready=True))
    cluster.blame(failed("b", "storage"))
    assert told() == [], "not the host's fault"
    cluster.blame(failed("b"))  # before anyone has looked who is there
    cluster.assemble(tmp_path)
    assert told() == [("excluded", "b"), ("spare", "c")]
    assert ranks(cluster) == {"c": 1}
    while (order := next_order(old)).do != "leave":
        pass
    assert "failed too often" in order.message and order.code == 70
    again = nodes.join("b")
    until(lambda: (cluster.poll(), again.orders)[1])
    assert [order.do for order in again.orders if str(again.id) in order.ranks] == ["leave"]
    cluster.end()


def test_a_host_that_cannot_be_spared_stays(nodes: Nodes, tmp_path: Path) -> None:
    cluster = nodes.lead(2)
    nodes.join("b")
    told = begun(cluster, nodes, tmp_path)
    cluster.blame(failed("b"))
    assert told() == [] and ranks(cluster) == {"b": 1}
    cluster.end()


def test_a_leader_that_fails_again_and_again_leaves_to_another(nodes: Nodes, tmp_path: Path) -> None:
    cluster = nodes.lead("1:2")
    link = nodes.join("b")
    begun(cluster, nodes, tmp_path)
    link.tell(Status(ready=True, orders_done=9))  # whatever it is told, it has done
    with pytest.raises(Deposed, match="h0 failed too often"):
        cluster.blame(failed("h0"))
    while next_order(link).do != "succeed":
        pass
    cluster.end()


def test_a_node_that_comes_back_is_taken_in_after_the_next_checkpoint(nodes: Nodes, tmp_path: Path) -> None:
    cluster = nodes.lead("1:2", join=0.0)
    told = begun(cluster, nodes, tmp_path)
    assert cluster.world is not None and cluster.world.config.launcher.num_nodes == 1
    link = nodes.join("b")
    link.tell(Status(ready=True))
    until(lambda: (cluster.poll(), all(member.status.ready for member in cluster.members.values()))[1])
    assert told() == [("back", "b")]
    assert cluster.due_to_regroup() is None, "no checkpoint since"
    step = cluster.world.run.path / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    (step / "manifest.json").touch()
    until(cluster.due_to_regroup)
    cluster.assemble(tmp_path)
    assert told() == [("back", "b"), ("taken_in", "b")]
    assert cluster.world.config.launcher.num_nodes == -1 and len(cluster.seated) == 1
    cluster.end()
