"""Node 0's side of a run on several nodes: who is there, and what they are told.

::

    hello ─▶ alike? ─▶ prepare ─▶ ready ─▶ start g ─▶ … ─▶ kill g ─▶ (a node lost: wait for it) ─▶ start g + 1
                                                        └▶ leave: every command ends with the same code
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent import Incomplete
from launch.control import Hello, Order, Status, period_seconds
from launch.failure import Failure
from launch.outcome import EXIT_CONFIG, EXIT_GAVE_UP, EXIT_STOPPED, Outcome
from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.network import serve

if TYPE_CHECKING:
    import torch.distributed as dist

TOKEN_FILE = ".nodes"
_POLL_SECONDS = 0.05
_SAY_SECONDS = 10.0
_LEAVE_SECONDS = 5.0
_DEAF_SECONDS = 10.0
"""A node that owes an answer and has been silent for so long will not give it."""


@dataclass
class Member:
    """Another node's agent, as last heard of.

    Attributes:
        failure: the one in its status, with our clock's time.
        seen: when its beat last grew, by the monotonic clock.
    """

    id: int
    hello: Hello
    node_rank: int
    status: Status = field(default_factory=Status)
    failure: Failure | None = None
    beat: bytes = b""
    seen: float = field(default_factory=time.monotonic)
    lost: bool = False

    @property
    def name(self) -> str:
        return f"node {self.node_rank} ({self.hello.host})"

    def hear(self, status: Status) -> None:
        """Take in its newest status."""
        if status.failure is None:
            self.failure = None
        elif status.failure != self.status.failure:
            happened = time.time() - status.failure_age  # by our clock
            began = happened - (status.failure.time - status.failure.began)
            self.failure = replace(status.failure, time=happened, began=began)
        self.status = status

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self.seen


class Cluster:
    """The nodes of a run.

    Args:
        store: hosted by this process.
        mine: this node's own hello; it is node 0.
        config: resolved.
        say: shows the user a line.

    Attributes:
        members: the others, by agent id; lost ones are dropped when the next generation is made up.
        node_timeout: seconds of silence after which a node is lost.
        outcome: how everyone's command ends.
        stopped: whether this node was asked to stop; read while waiting for others.
    """

    def __init__(
        self, store: dist.Store, mine: Hello, config: RunConfig, say: Callable[[str], None] = print
    ) -> None:
        self.nnodes = config.launcher.nnodes
        self.outcome: Outcome | None = None
        self.stopped: Callable[[], bool] = lambda: False
        self.members: dict[int, Member] = {}
        self._store, self._mine, self._say = store, mine, say
        self._join_timeout = config.launcher.join_timeout_seconds
        self.node_timeout = config.resilience.node_timeout_seconds
        self._strangers: set[int] = set()
        self._known = self._changes = self._orders = 0
        self._beats_at = 0.0
        self._complete = False

    # -- who is there -------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what the others have said since the last look.

        Raises:
            ConfigError: before the first generation: a node is not like this one.
        """
        changes = self._store.add("changes", 0)
        if changes != self._changes:
            self._changes = changes
            total = self._store.add("members", 0)
            self._strangers.update(range(self._known, total))
            self._known = total
            for member, text in zip(self.members.values(), self._read("status"), strict=True):
                member.hear(Status.from_json(text))
        now = time.monotonic()
        if now - self._beats_at > max(0.25, 5 * period_seconds(self.nnodes)):
            self._beats_at = now
            for member, beat in zip(self.members.values(), self._read("beat"), strict=True):
                if beat != member.beat:
                    member.beat, member.seen = beat, now
        self._look_at_strangers()
        for member in self.members.values():
            member.lost = member.lost or member.status.left or member.silent_seconds > self.node_timeout

    def _read(self, kind: str) -> list[bytes]:
        keys = [f"{kind}/{identity}" for identity in self.members]
        return list(self._store.multi_get(keys)) if keys else []

    def _look_at_strangers(self) -> None:
        if not self._strangers or (self._complete and not self._free_ranks()):
            return  # it may take the place of one that is lost, which takes a while to be known
        for identity in sorted(self._strangers):
            if self._store.check([f"hello/{identity}"]):
                self._strangers.discard(identity)
                self._admit(identity, Hello(**json.loads(self._store.get(f"hello/{identity}"))))

    def _taken_ranks(self) -> dict[int, str]:
        here = {member.node_rank: member.hello.host for member in self.members.values() if not member.lost}
        return {0: self._mine.host} | here

    def _free_ranks(self) -> list[int]:
        taken = self._taken_ranks()
        return [rank for rank in range(self.nnodes) if rank not in taken]

    def _admit(self, identity: int, hello: Hello) -> None:
        try:
            self._mine.check_alike(hello, configs=not self._complete)
            rank = self._rank_for(hello)
        except ConfigError as error:
            if not self._complete:
                raise
            self.order("leave", ranks={str(identity): -1}, code=EXIT_CONFIG, message=str(error))
            return
        member = self.members[identity] = Member(identity, hello, rank)
        member.hear(Status.from_json(self._store.get(f"status/{identity}")))  # its news may have been counted
        self._say(f"node {rank} of {self.nnodes} is here: {hello.host}")

    def _rank_for(self, hello: Hello) -> int:
        taken, free = self._taken_ranks(), self._free_ranks()
        if hello.node_rank is not None and hello.node_rank in taken:
            raise ConfigError(
                "launcher.node_rank",
                hello.node_rank,
                f"{taken[hello.node_rank]} and {hello.host} both call themselves node {hello.node_rank}",
                "give each node a rank of its own, or none",
            )
        if not free:
            raise ConfigError(
                "launcher.nnodes",
                self.nnodes,
                f"{hello.host} is one node too many: there are {', '.join(taken.values())}",
                f"launcher.nnodes={self.nnodes + 1}, or start fewer",
            )
        return free[0] if hello.node_rank is None else hello.node_rank

    def gather(self) -> None:
        """Wait until every node is there.

        Raises:
            ConfigError: a node does not fit.
            Incomplete: some did not come in time, or somebody asked to stop.
        """
        self.poll()
        self._drop_lost()
        began = said = time.monotonic()
        while len(self.members) < self.nnodes - 1:
            now = time.monotonic()
            if self.stopped() or self.asked_to_stop():
                raise Incomplete("stopped", stopped=True)
            if now - began > self._join_timeout:
                raise Incomplete(
                    f"after launcher.join_timeout_seconds={self._join_timeout:g} without {self._missing()}"
                )
            if now - said > _SAY_SECONDS or said == began:
                said = now
                self._say(f"Waiting for {self._missing()}: start the same command there")
            time.sleep(_POLL_SECONDS)
            self.poll()
            self._drop_lost()

    def _drop_lost(self) -> None:
        lost = [member for member in self.members.values() if member.lost]
        for member in lost:
            del self.members[member.id]
        if lost:  # should one of them be alive after all
            message = (
                "node 0 had not heard from this node for too long and goes on without it; start it again"
            )
            ranks = {str(member.id): -1 for member in lost}
            self.order("leave", ranks=ranks, code=EXIT_GAVE_UP, message=message)

    def _missing(self) -> str:
        here = self._taken_ranks()
        absent = [str(rank) for rank in self._free_ranks()]
        shown = ", ".join(absent[:8]) + (" …" if len(absent) > 8 else "")
        told = [f"{rank} ({host})" for rank, host in sorted(here.items())]
        present = ", ".join(told[:8]) + (" …" if len(told) > 8 else "")
        return f"node {shown} of {self.nnodes} (here: {present})"

    def prepare(self, run_dir: Path) -> None:
        """Let every node look at the run directory and get the data.

        Raises:
            ConfigError: one cannot, or was lost meanwhile; the message names its host.
            Incomplete: somebody asked to stop.
        """
        new = [member for member in self.members.values() if not member.status.ready]
        if not new:
            return
        token = secrets.token_hex(8)
        (run_dir / TOKEN_FILE).write_text(token)
        ranks = {str(member.id): member.node_rank for member in new}
        self.order("prepare", ranks=ranks, run_dir=str(run_dir), token=token)
        while not all(member.status.ready for member in new):
            time.sleep(_POLL_SECONDS)
            self.poll()
            for member in new:
                if member.status.error is not None:
                    raise ConfigError(*member.status.error)
                if member.lost:
                    raise ConfigError(
                        "launcher.nnodes",
                        self.nnodes,
                        f"{member.name} was lost before the start",
                        f"look at what its command printed on {member.hello.host}",
                    )
            if self.stopped() or self.asked_to_stop():
                raise Incomplete("stopped", stopped=True)

    def assemble(self, run_dir: Path) -> None:
        """See every node there and ready, before a generation starts.

        Raises:
            Incomplete: they are not, for whatever reason; or somebody asked to stop.
        """
        try:
            self.gather()
            self.prepare(run_dir)
        except ConfigError as error:
            raise Incomplete(str(error)) from error
        self._complete = True

    # -- what they are told -------------------------------------------------------------------------------

    def order(self, do: str, ranks: dict[str, int] | None = None, **fields: object) -> int:
        """Tell every node, or those in ``ranks``. Returns how many orders there are now."""
        everyone = {str(member.id): member.node_rank for member in self.members.values()}
        order = Order(do, everyone if ranks is None else ranks, **fields)  # type: ignore[arg-type]
        self._store.set(f"order/{self._orders}", json.dumps(asdict(order)))
        self._orders = self._store.add("orders", 1)
        return self._orders

    def wait_done(self, orders: int) -> None:
        """Wait until all who can be heard have carried out so many orders; who does not is lost."""
        until = time.monotonic() + self.node_timeout
        while waiting := [m for m in self.members.values() if not m.lost and m.status.orders_done < orders]:
            for member in waiting:
                silent = member.silent_seconds > min(_DEAF_SECONDS, self.node_timeout)
                member.lost = silent or time.monotonic() > until
            time.sleep(_POLL_SECONDS)
            self.poll()

    def asked_to_stop(self) -> str | None:
        """The signal that another node was given, with the node's name."""
        for member in self.members.values():
            if member.status.stopping is not None:
                return f"{member.status.stopping} on {member.name}"
        return None

    def dismiss(self, outcome: Outcome) -> None:
        """Tell every node to end as this one does. Returns when they have heard it, or soon."""
        self._known = self._store.add("members", 0)
        everyone = [identity for identity in range(self._known) if self._store.check([f"status/{identity}"])]
        ranks = {str(identity): -1 for identity in everyone}
        orders = self.order("leave", ranks=ranks, code=outcome.code, message=outcome.message)
        lost = {member.id for member in self.members.values() if member.lost}
        until = time.monotonic() + _LEAVE_SECONDS
        for identity in (identity for identity in everyone if identity not in lost):
            while time.monotonic() < until:
                status = Status.from_json(self._store.get(f"status/{identity}"))
                if status.orders_done >= orders or status.left:
                    break
                time.sleep(_POLL_SECONDS)


@contextmanager
def lead(config: RunConfig, mine: Hello, say: Callable[[str], None]) -> Iterator[Cluster]:
    """Host the control store and wait for the other nodes; at the end they are told how it ended.

    Raises:
        ConfigError: the port is taken, a node does not fit or does not come.
    """
    launcher = config.launcher
    assert launcher.master_addr is not None
    cluster = Cluster(
        serve(launcher.master_addr, launcher.master_port, "launcher.master_port"), mine, config, say
    )
    outcome = Outcome(EXIT_STOPPED, "Node 0 ended without a word.")
    try:
        try:
            cluster.gather()
        except Incomplete as missing:
            raise ConfigError(
                "launcher.nnodes",
                launcher.nnodes,
                f"gave up {missing}",
                "start the same command on every node",
            ) from None
        yield cluster
        if cluster.outcome is not None:
            outcome = cluster.outcome
    except ConfigError as error:
        outcome = Outcome(EXIT_CONFIG, str(error))
        raise
    except BaseException as error:
        outcome = Outcome(EXIT_STOPPED, f"{mine.host}: {type(error).__name__} {error}".rstrip())
        raise
    finally:
        cluster.dismiss(outcome)
