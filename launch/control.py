"""What the agents of a run's nodes tell one another, through a store that node 0's agent hosts.

==================  ===================  ============================================================
key                 written by           what
==================  ===================  ============================================================
``members``         each agent, + 1      gives an agent its id, in order of arrival
``hello/{id}``      agent ``id``, once   :class:`Hello`
``beat/{id}``       agent ``id``, + 1    it lives
``status/{id}``     agent ``id``         its newest :class:`Status`
``changes``         each agent, + 1      grows after each hello and status: one look tells if there is news
``orders``          node 0, + 1          how many orders there are
``order/{n}``       node 0               :class:`Order`, for everyone, carried out in order
==================  ===================  ============================================================
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from launch.failure import Failure
from parallel.errors import ConfigError
from trainer.environment import check_alike

if TYPE_CHECKING:
    import torch.distributed as dist

_PATIENCE = timedelta(seconds=30)


def period_seconds(nnodes: int) -> float:
    """Seconds between a node's looks at the store: instant for a few nodes, bearable for thousands."""
    return max(0.05, nnodes / 4000)


@dataclass(frozen=True)
class Hello:
    """Who an agent is.

    Attributes:
        node_rank: the one it was given; None: any.
        num_workers: ranks it will run.
        fingerprint: versions and code, as :func:`trainer.environment.fingerprint` tells them.
        asked: the config it was started with, flat: ``optim.lr`` → 0.001.
        address, port: of a store that it hosts, for the day when it leads.
    """

    host: str
    node_rank: int | None
    num_workers: int
    device: str
    fingerprint: dict[str, str]
    asked: dict[str, Any]
    address: str = ""
    port: int = 0

    def check_alike(self, other: Hello, configs: bool) -> None:
        """Compare another node with this one.

        Args:
            configs: compare what they were started with, too.

        Raises:
            ConfigError: they differ; the message names the other's host and the difference.
        """
        check_alike([self.fingerprint, other.fingerprint])
        for name, ours, theirs in (
            ("launcher.nproc_per_node", self.num_workers, other.num_workers),
            ("device", self.device, other.device),
        ):
            if ours != theirs:
                relation = f"on {other.host}, but {ours} on {self.host}"
                raise ConfigError(name, theirs, relation, f"{name}={ours} on every node")
        keys = [key for key in self.asked if configs and self.asked[key] != other.asked.get(key)]
        if keys:
            told = "; ".join(
                f"{key} is {other.asked.get(key)} there and {self.asked[key]} here" for key in keys[:5]
            )
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ConfigError(
                keys[0],
                other.asked.get(keys[0]),
                f"{other.host} was started with another config than {self.host}: {told}{more}",
                "start the same command on every node",
            )


@dataclass
class Status:
    """How a node fares.

    Attributes:
        orders_done: how many orders it has carried out.
        ready: it sees the run directory and has the data.
        generation: of ``codes`` and ``failure``.
        codes: exit codes of its ranks, None while they live.
        failure: the most likely origin of what failed on this node.
        failure_age: seconds since then, so that clocks need not agree.
        stopping: the signal that asked this node to stop.
        left: it is about to end.
        error: a ConfigError's four parts: this node cannot work.
    """

    orders_done: int = 0
    ready: bool = False
    generation: int = -1
    codes: list[int | None] = field(default_factory=list)
    failure: Failure | None = None
    failure_age: float = 0.0
    stopping: str | None = None
    left: bool = False
    error: list[str] | None = None

    @classmethod
    def from_json(cls, text: bytes) -> Status:
        """What :meth:`to_json` wrote."""
        values = json.loads(text)
        if values["failure"] is not None:
            values["failure"] = Failure(**values["failure"])
        return cls(**values)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Order:
    """What every node is to do.

    Attributes:
        do: ``prepare`` (look at the run directory, get the data), ``start`` a generation, ``terminate`` the
            workers (ask them to save), ``kill`` them, ``leave`` (end); ``roster``: who takes over from node 0, in
            order; ``succeed``: node 0 leaves, do so now.
        ranks: agent id → node rank, of those who are meant.
        run_dir, token: for ``prepare``: the directory, and what its token file holds.
        generation: for ``start`` and ``kill``.
        num_nodes: for ``start``: of the layout, whose config is then in force.
        check_exchanges: for ``start``: the workers compare each exchange with their peers.
        code, message: for ``leave``: how the command ends; for ``succeed``: why.
        roster: [agent id, host, node rank] of each node, first the one that takes over first.
        term: for ``roster``: :class:`trainer.terms.Term` of the leader, as a dict.
    """

    do: str
    ranks: dict[str, int]
    run_dir: str = ""
    token: str = ""
    generation: int = -1
    num_nodes: int = -1
    check_exchanges: bool = False
    code: int = 0
    message: str = ""
    roster: list[tuple[int, str, int]] = field(default_factory=list)
    term: dict[str, Any] = field(default_factory=dict)


class Link(threading.Thread):
    """A node's side: keeps the beat, sends statuses, fetches orders. Its calls never block on the network.

    Attributes:
        id: of this agent.
        status: as it stood when this agent joined.
        orders: fetched and not yet taken.
    """

    def __init__(self, store: dist.Store, hello: Hello, nnodes: int, timeout_seconds: float) -> None:
        super().__init__(name="muster-link", daemon=True)
        self.orders: deque[Order] = deque()
        self._store, self._timeout = store, timeout_seconds
        self._period = period_seconds(nnodes)
        self._newest: Status | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._sent = threading.Event()
        self._sent.set()
        self._error: str | None = None
        # What was ordered before does not concern a newcomer.
        self.status = Status(orders_done=store.add("orders", 0))
        self.id = store.add("members", 1) - 1
        self._told = self.status.to_json()
        for key, value in (("beat", "0"), ("status", self._told), ("hello", json.dumps(asdict(hello)))):
            store.set(f"{key}/{self.id}", value)
        store.add("changes", 1)
        self._heard = time.monotonic()
        self.start()

    @property
    def lost(self) -> str | None:
        """Why node 0 cannot be heard any more; None while it can."""
        if self._error is not None:
            return self._error
        silent = self.silent_seconds
        return f"no answer for {silent:.0f} s" if silent > self._timeout else None

    @property
    def silent_seconds(self) -> float:
        """Since the last answer."""
        return time.monotonic() - self._heard

    def tell(self, status: Status) -> None:
        """Send this status soon."""
        text = status.to_json()
        with self._lock:
            if text != self._told:
                self._told, self._newest = text, Status.from_json(text.encode())
                self._sent.clear()

    def close(self) -> None:
        """Send what is left, for a moment, and end."""
        if self._error is None:
            self._sent.wait(2.0)
        self._ended.set()
        self.join(1.0)

    def run(self) -> None:
        seen = self.status.orders_done
        try:
            while not self._ended.is_set():
                seen = self._exchange(seen)
                self._heard = time.monotonic()
                time.sleep(self._period)
        except RuntimeError as error:  # every error of torch's store is one
            self._error = str(error).splitlines()[0]

    def _exchange(self, seen: int) -> int:
        """One round; how many orders have been seen."""
        self._store.add(f"beat/{self.id}", 1)
        with self._lock:
            status, self._newest = self._newest, None
        if status is not None:
            self._store.set(f"status/{self.id}", status.to_json())
            self._store.add("changes", 1)
            self._sent.set()
        for number in range(seen, total := self._store.add("orders", 0)):
            key = f"order/{number}"
            self._store.wait([key], _PATIENCE)
            self.orders.append(Order(**json.loads(self._store.get(key))))
        return total
