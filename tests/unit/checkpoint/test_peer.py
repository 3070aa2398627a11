"""The peer tier between two memories of one process: what arrives, what is refused, what is given back."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallel.engines.base import StateSlice
from trainer.checkpoint.lease import Lease, memory_folder
from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.peer import Member, PeerTier, receiver_of
from trainer.checkpoint.timeline import Timelines
from trainer.checkpoint.vote import Snapshot
from trainer.checkpoint.wire import WireError, receive_frame, send_frame

RNG = {"torch_rng": torch.arange(16, dtype=torch.uint8)}


def state(value: float) -> list[StateSlice]:
    return [StateSlice("model.w", (1000,), (0,), torch.full((1000,), value), owner=True)]


class Node:
    """A machine with one rank."""

    def __init__(self, root: Path, rank: int, timelines: Timelines) -> None:
        root.mkdir(exist_ok=True)
        self.rank, self.timelines = rank, timelines
        lease = Lease(memory_folder(str(root), root / "run"), root / "run")
        self.memory = MemoryTier(lease, rank, 2, 0, "layout", 3)
        self.layout = self.memory.plan(state(0), RNG).layout
        self.peers = PeerTier(self.memory, "127.0.0.1", "secret")

    def member(self) -> Member:
        return Member(f"host-{self.rank}", "127.0.0.1", self.peers.port, self.memory.plan(state(0), RNG).room)

    def train(self, step: int) -> None:
        self.memory.wait()
        self.peers.wait()
        self.memory.snapshot(step, state(step), RNG, {"step": step}, self.timelines, self.peers.send)

    def settle(self) -> None:
        self.memory.wait()
        self.peers.wait()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Node]]:
    timelines = Timelines(starts=[0])
    nodes = [Node(tmp_path / str(rank), rank, timelines) for rank in range(2)]
    members = [node.member() for node in nodes]
    for node in nodes:
        node.memory.claim("here", state(0), RNG)
        node.memory.prepare(torch.device("cpu"))
        node.peers.join(node.rank, members)
    yield nodes
    for node in nodes:
        node.settle()
        node.peers.remove()
        node.memory.remove()


def test_a_wiped_memory_is_filled_from_the_peer(pair: list[Node]) -> None:
    first, second = pair
    for step in range(1, 6):
        second.train(step)
    second.settle()
    run = second.timelines.run
    held = [snapshot.step for snapshot, _ in first.peers.held(run)[1]]
    assert sorted(held) == [3, 4, 5] and second.peers.failed is None
    for slot in second.memory.slots:
        slot.unseal()
    newest = Snapshot(5, 0)
    assert second.peers.fetch(newest, second.layout, run, first.member()) is None
    assert second.memory.offers(run, second.layout) == (newest,)
    into = state(0)
    found, tensors = second.memory.load(newest, into, list(RNG))
    assert found == {"step": 5} and torch.equal(tensors["torch_rng"], RNG["torch_rng"])
    assert torch.equal(into[0].tensor, state(5)[0].tensor)
    assert second.peers.fetch(Snapshot(1, 0), second.layout, run, first.member()) is not None, "long gone"


def test_a_damaged_copy_and_a_stranger_are_refused(pair: list[Node]) -> None:
    first, second = pair
    second.train(1)
    second.settle()
    run = second.timelines.run
    (kept,) = (slot for slot in first.peers._held[1] if slot.header is not None)
    kept.bytes[5000] ^= 1
    fault = second.peers.fetch(Snapshot(1, 0), second.layout, run, first.member())
    assert fault is not None and "changed on its way" in fault
    first.peers.drop(1, Snapshot(1, 0))
    assert first.peers.held(run)[1] == ()
    with socket.create_connection(("127.0.0.1", first.peers.port)) as link:
        send_frame(link, {"token": "guess", "get": {}})
        with pytest.raises(OSError):
            receive_frame(link)


def test_a_peer_that_is_gone_costs_no_step(pair: list[Node]) -> None:
    first, second = pair
    first.peers.remove()
    for step in (1, 2):
        second.train(step)
    second.settle()
    assert second.peers.failed is not None and "host-0" in second.peers.failed
    assert second.memory.sealed(2)


def test_a_changed_frame_is_not_believed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(ours, {"a": 1})
        raw = bytearray(theirs.recv(1 << 16))
        raw[-2] ^= 1
        ours.sendall(raw)
        with pytest.raises(WireError, match="changed on its way"):
            receive_frame(theirs)


def test_the_ring_leaves_the_host() -> None:
    members = [Member(host, "", 0, 0) for host in ("a", "a", "b", "b", "c", "c")]
    assert [receiver_of(rank, members) for rank in range(6)] == [2, 3, 4, 5, 0, 1]
    assert receiver_of(0, members[:2]) is None
