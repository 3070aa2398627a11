"""The peer tier: a sealed snapshot is copied to the memory of another node, behind training.

    node a   rank 0 ──▶ rank 2   node b        each rank sends to the next node in the ring of hosts,
             rank 1 ──▶ rank 3                 which keeps the newest three snapshots of each sender
             rank 2 ──▶ rank 0   node a

At a start every rank says in the vote what it holds for others; a rank whose own memory is gone fetches its
snapshot from there. A body has the checksum of its slot's header, taken where the snapshot was made and checked
where it is kept and again where it is used. Only who knows the token of this generation is listened to.

One snapshot is on its way at a time; the next one to be sent waits for it. So all ranks hold, and all peers have
been given, the same steps: the newest that was sent and the one before it stay in memory until a later one is
safe (trainer/checkpoint/memory.py).
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.slots import HEADER_BYTES, Header, Slot
from trainer.checkpoint.vote import Snapshot
from trainer.checkpoint.wire import WireError, receive_frame, receive_into, send_frame

NUM_KEPT = 3
"""Snapshots kept of each sender: the newest may not be everyone's yet, and one is being received."""
_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Member:
    """Where a rank's peer tier listens; ``room``: bytes of a slot of its state."""

    host: str
    address: str
    port: int
    room: int


def receiver_of(rank: int, members: Sequence[Member]) -> int | None:
    """The rank that keeps copies for ``rank``: on the next host, at the same place there. None: no other host."""
    hosts = list(dict.fromkeys(member.host for member in members))
    if len(hosts) < 2:
        return None
    on = {host: [r for r, member in enumerate(members) if member.host == host] for host in hosts}
    mine = members[rank].host
    there = on[hosts[(hosts.index(mine) + 1) % len(hosts)]]
    return there[on[mine].index(rank) % len(there)]


def address_towards(host: str) -> str:
    """This machine's address on the route to ``host`` (UDP: nothing is sent)."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


class PeerTier:
    """What this rank sends to another node, and what it keeps for others. Threads; no collective.

    Args:
        memory: this rank's snapshots.
        address: under which other nodes reach this one.
        token: the same on every rank of this generation.
    """

    def __init__(self, memory: MemoryTier, address: str, token: str) -> None:
        self.memory, self._token = memory, token
        self.failed: str | None = None
        self._held: dict[int, list[Slot]] = {}
        for path in sorted(memory.lease.folder.glob("peer-*.slot-*")):
            self._held.setdefault(int(path.name[5:].partition(".")[0]), []).append(Slot(path))
        self._lock = threading.Lock()  # of _held and the slots in it
        self._to: Member | None = None
        self._sender = ThreadPoolExecutor(1, "muster-peer-send")
        self._sending: Future[None] | None = None
        self._server = socket.create_server((address, 0))
        self.address, self.port = address, int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, name="muster-peer", daemon=True).start()

    def incoming(self, rank: int, members: Sequence[Member]) -> list[int]:
        """Whose copies this rank keeps."""
        return [other for other in range(len(members)) if receiver_of(other, members) == rank]

    def missing(self, rank: int, members: Sequence[Member]) -> int:
        """Bytes that :meth:`join` will reserve."""
        return sum(
            max(0, members[origin].room - (slots[index].size if index < len(slots) else 0))
            for origin in self.incoming(rank, members)
            for slots in (self._held.get(origin, []),)
            for index in range(NUM_KEPT)
        )

    def join(self, rank: int, members: Sequence[Member]) -> None:
        """Take the place in the ring: reserve memory for others' copies, give back what nobody sends any more.

        Raises:
            OSError: there is no room.
        """
        receiver = receiver_of(rank, members)
        expected = self.incoming(rank, members)
        with self._lock:
            for origin in set(self._held) - set(expected):
                for slot in self._held.pop(origin):
                    slot.remove()
            for origin in expected:
                slots = self._held.setdefault(origin, [])
                while len(slots) < NUM_KEPT:
                    slots.append(Slot(self.memory.lease.folder / f"peer-{origin:05d}.slot-{len(slots)}"))
                for slot in slots:
                    slot.reserve(members[origin].room)
        self._to = None if receiver is None else members[receiver]

    def held(self, run: str) -> dict[int, tuple[tuple[Snapshot, str], ...]]:
        """What a ballot says of the copies here."""
        with self._lock:
            return {
                origin: tuple(
                    (slot.header.snapshot, slot.header.layout)
                    for slot in slots
                    if slot.header is not None and slot.header.run == run
                )
                for origin, slots in self._held.items()
            }

    def send(self, slot: Slot) -> None:
        """Begin to copy a sealed slot to the other node; it is not overwritten meanwhile."""
        to = self._to
        if to is not None:
            slot.busy += 1
            self._sending = self._sender.submit(self._send, slot, to)

    def wait(self) -> None:
        """Until what is being sent has arrived, or has failed."""
        if self._sending is not None:
            self._sending.result()

    def _send(self, slot: Slot, to: Member) -> None:
        header = slot.header
        assert header is not None
        try:
            with self._connect(to) as link:
                send_frame(link, {"token": self._token, "put": asdict(header)})
                link.sendall(slot.bytes.numpy().data[HEADER_BYTES : header.size])
                _expect(receive_frame(link))
            self.failed = None
        except OSError as error:
            if self.failed is None:
                logging.getLogger(__name__).warning(
                    "snapshot %d not sent to %s: %s", header.step, to.host, error
                )
            self.failed = f"snapshot of step {header.step} did not reach {to.host}: {error}"
        finally:
            slot.busy -= 1

    def fetch(self, snapshot: Snapshot, layout: str, run: str, holder: Member) -> str | None:
        """Bring this rank's snapshot from the rank that holds it into an own slot. Returns what went wrong."""
        memory = self.memory
        wanted = {"run": run, "rank": memory.rank, "step": snapshot.step, "timeline": snapshot.timeline}
        try:
            with self._connect(holder) as link:
                send_frame(link, {"token": self._token, "get": wanted})
                header = Header(**_expect(receive_frame(link))["header"])
                if (header.run, header.snapshot, header.layout) != (run, snapshot, layout):
                    raise WireError("another snapshot came than the one asked for")
                _receive(link, min(memory.slots, key=_age), header)
        except OSError as error:
            return f"the copy of step {snapshot.step} of rank {memory.rank} on {holder.host}: {error}"
        return None

    def _connect(self, to: Member) -> socket.socket:
        link = socket.create_connection((to.address, to.port), timeout=_CONNECT_SECONDS)
        link.settimeout(_SILENCE_SECONDS)
        return link

    def _serve(self) -> None:
        with suppress(OSError):  # closed: an ordinary end
            while True:
                link, _ = self._server.accept()
                threading.Thread(
                    target=self._answer, args=(link,), name="muster-peer-link", daemon=True
                ).start()

    def _answer(self, link: socket.socket) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError), link:  # who sends nonsense gets no answer
            link.settimeout(_SILENCE_SECONDS)
            asked = receive_frame(link)
            if not hmac.compare_digest(str(asked.get("token")), self._token):
                return
            with self._lock:
                if "put" in asked:
                    self._keep(link, Header(**asked["put"]))
                elif "get" in asked:
                    self._give(link, asked["get"])

    def _keep(self, link: socket.socket, header: Header) -> None:
        slots = self._held.get(header.rank, [])
        if not slots:
            send_frame(link, {"error": f"no room was reserved for rank {header.rank}"})
            return
        try:
            _receive(link, min(slots, key=_age), header)
        except WireError as error:
            send_frame(link, {"error": str(error)})
            raise
        send_frame(link, {"kept": header.step})

    def _give(self, link: socket.socket, wanted: dict[str, Any]) -> None:
        for slot in self._held.get(wanted["rank"], []):
            header = slot.header
            if header is None or (header.run, header.step, header.timeline) != (
                wanted["run"], wanted["step"], wanted["timeline"],
            ):  # fmt: skip
                continue
            send_frame(link, {"header": asdict(header)})
            link.sendall(slot.bytes.numpy().data[HEADER_BYTES : header.size])
            return
        send_frame(link, {"error": "it is not here any more"})

    def drop(self, rank: int, snapshot: Snapshot) -> None:
        """Strike off a copy that turned out to be damaged."""
        with self._lock:
            for slot in self._held.get(rank, []):
                if slot.header is not None and slot.header.snapshot == snapshot:
                    slot.unseal()

    def remove(self) -> None:
        """Give the memory back."""
        self._server.close()
        self._sender.shutdown(wait=True)
        with self._lock:
            for slots in self._held.values():
                for slot in slots:
                    slot.remove()


def _age(slot: Slot) -> tuple[int, int]:
    """The least is overwritten first."""
    return (-2, -1) if slot.header is None else (slot.header.timeline, slot.header.step)


def _expect(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise WireError(str(answer["error"]))
    return answer


def _receive(link: socket.socket, slot: Slot, header: Header) -> None:
    """Fill a slot with a body and seal it, if it is what its header says."""
    slot.reserve(header.size)
    slot.unseal()
    receive_into(link, slot.bytes.numpy().data[HEADER_BYTES : header.size])
    if slot.checksum(header) != header.checksum:
        raise WireError("the snapshot was changed on its way")
    slot.seal(header)
