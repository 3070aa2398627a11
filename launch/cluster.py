"""Node 0's side of a run on several nodes: who is there, and what they are told.

::

    hello ─▶ alike? ─▶ prepare ─▶ ready ─▶ start g ─▶ … ─▶ kill g ─▶ (a node lost: wait for it) ─▶ start g + 1
                                                        └▶ leave: every command ends with the same code

Between two generations seats are dealt (launch/seats.py). With ``launcher.nnodes=MIN:MAX`` there may then be fewer
nodes, or more, and another layout (launch/world.py).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent import Incomplete
from launch.charge import Charge, Deposed, Inheritance
from launch.control import Hello, Order, Status, period_seconds
from launch.failure import Failure
from launch.member import Member, ranks_of
from launch.outcome import EXIT_CONFIG, EXIT_GAVE_UP, EXIT_STOPPED, Outcome
from launch.seats import Offences, assign
from launch.world import World
from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.config_launcher import node_range, num_hosts, num_nodes
from trainer.network import serve
from trainer.rundir import RunDirectory

if TYPE_CHECKING:
    import torch.distributed as dist

TOKEN_FILE = ".nodes"
_POLL_SECONDS = 0.05
_SAY_SECONDS = 10.0
_LEAVE_SECONDS = 5.0
_DEAF_SECONDS = 10.0
"""A node that owes an answer and has been silent for so long will not give it."""
_SPARE = 1 << 30
"""In the roster, the node rank of who has no seat."""
_HOST_KINDS = ("crash", "hang", "straggler", "corruption", "node-lost")
"""Failures that may come of the host they happened on."""
_CHECKPOINT_SECONDS = 0.5
"""Between looks for a new checkpoint, while a node waits to be taken in."""


class Cluster:
    """The nodes of a run.

    Args:
        store: hosted by this process.
        mine: this node's own hello; it is node 0.
        config: resolved.
        say: shows the user a line.
        inheritance: None: the first leader of the run.

    Attributes:
        members: the others, by agent id; lost ones are dropped when the next generation is made up.
        seated: those of them that work in this generation, by node rank.
        world: the run's layouts, once there is a run.
        node_timeout: seconds of silence after which a node is lost.
        outcome: how everyone's command ends.
        stopped: whether this node was asked to stop; read while waiting for others.
    """

    def __init__(
        self,
        store: dist.Store,
        mine: Hello,
        config: RunConfig,
        say: Callable[[str], None] = print,
        inheritance: Inheritance | None = None,
    ) -> None:
        self.least, self.nnodes = node_range(config.launcher)
        self.world: World | None = None
        self.seated: list[Member] = []
        self.outcome: Outcome | None = None
        self.stopped: Callable[[], bool] = lambda: False
        self.members: dict[int, Member] = {}
        self._store, self._mine, self._say = store, mine, say
        self._spares, self._hosts = config.launcher.spares, num_hosts(config.launcher)
        self._join_timeout = config.launcher.join_timeout_seconds
        self._rejoin = config.launcher.rejoin_seconds
        self._offences = Offences(config.resilience.host_failures)
        self._excluded: dict[str, str] = {}
        self._peers = {} if inheritance is None else dict(inheritance.peers)
        self._been = {host for host, rank in self._peers.items() if rank < self.nnodes}
        self._given_up = 0
        self._token = ""
        self._grows = self._running = False
        self._checkpoints_at = 0.0
        self.node_timeout = config.resilience.node_timeout_seconds
        self._strangers: set[int] = set()
        self._known = self._changes = self._orders = 0
        self._beats_at = 0.0
        self.inheritance = inheritance
        self._complete = inheritance is not None
        self._charge: Charge | None = None
        if inheritance is not None and inheritance.excluded:
            self._excluded[inheritance.leader] = inheritance.why

    @property
    def address(self) -> tuple[str, int]:
        """Where the store is, for all nodes."""
        return self._mine.address, self._mine.port

    def begin(self, run: RunDirectory, config: RunConfig) -> None:
        """Take charge of a run's directory.

        Raises:
            ConfigError: another agent has claimed the term, or it cannot be claimed.
        """
        self._charge = Charge(run, config, (self._mine.host, *self.address), self.inheritance)
        self.world = self._charge.world
        if self.inheritance is not None:
            self._given_up = self.nnodes - num_nodes(self.world.config.launcher)
            self._charge.take_over(self.inheritance, self._offences)

    def end(self) -> None:
        """Let go of the term."""
        if self._charge is not None:
            self._charge.end()

    # -- who is there -------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what the others have said since the last look.

        Raises:
            ConfigError: before the first generation: a node is not like this one.
            Deposed: another node leads.
        """
        if self._charge is not None:
            self._charge.hold(alone=len(self.seated) + 1 < self.nnodes)
        changes = self._store.add("changes", 0)
        if changes != self._changes:
            self._changes = changes
            total = self._store.add("members", 0)
            self._strangers.update(range(self._known, total))
            self._known = total
            for member, text in zip(self.members.values(), self._read("status"), strict=True):
                member.hear(Status.from_json(text))
        now = time.monotonic()
        if now - self._beats_at > max(0.25, 5 * period_seconds(self._hosts)):
            self._beats_at = now
            for member, beat in zip(self.members.values(), self._read("beat"), strict=True):
                if beat != member.beat:
                    member.beat, member.seen = beat, now
        self._look_at_strangers()
        for member in self.members.values():
            member.lost = member.lost or member.status.left or member.silent_seconds > self.node_timeout
        if self._complete:
            self._drop(member for member in self._idle() if member.lost or member.status.error is not None)

    def _idle(self) -> list[Member]:
        """Who has no work in this generation."""
        return [member for member in self.members.values() if member not in self.seated]

    def _read(self, kind: str) -> list[bytes]:
        keys = [f"{kind}/{identity}" for identity in self.members]
        return list(self._store.multi_get(keys)) if keys else []

    def _look_at_strangers(self) -> None:
        if not self._strangers or (self._complete and not self._has_room()):
            return  # it may take the place of one that is lost, which takes a while to be known
        for identity in sorted(self._strangers):
            if self._store.check([f"hello/{identity}"]):
                self._strangers.discard(identity)
                self._admit(identity, Hello(**json.loads(self._store.get(f"hello/{identity}"))))

    def _taken_ranks(self) -> dict[int, str]:
        here = {member.node_rank: member.hello.host for member in self.members.values() if not member.lost}
        return {0: self._mine.host} | {rank: host for rank, host in here.items() if rank is not None}

    def _free_ranks(self) -> list[int]:
        taken = self._taken_ranks()
        return [rank for rank in range(self.nnodes) if rank not in taken]

    def _has_room(self) -> bool:
        return sum(not member.lost for member in self.members.values()) < self._hosts - 1

    def _admit(self, identity: int, hello: Hello) -> None:
        try:
            self._mine.check_alike(hello, configs=not self._complete)
            if hello.host in self._excluded:
                self._send_away([identity], EXIT_GAVE_UP, self._excluded[hello.host])
                return
            known = hello.host in self._peers
            rank = self._rank_for(hello, self._peers.pop(hello.host, hello.node_rank))
        except ConfigError as error:
            if not self._complete:
                raise
            self._send_away([identity], EXIT_CONFIG, str(error))
            return
        member = self.members[identity] = Member(identity, hello, rank)
        member.checkpoint = None if self.world is None else self.world.run.newest_checkpoint()
        # One that has never worked here is a spare, even if a seat has become free in this very moment.
        member.spare = rank is None or (self._complete and self._spares > 0 and hello.host not in self._been)
        member.hear(Status.from_json(self._store.get(f"status/{identity}")))  # its news may have been counted
        if member.spare:
            self._say(f"{hello.host} is here: a spare")
        else:
            self._say(f"node {rank} of {self.nnodes} is here: {hello.host}")
            if self._complete and not known:
                self._tell("back", hello.host, rank)

    def _send_away(self, identities: Iterable[int], code: int, message: str) -> None:
        self.order("leave", ranks={str(identity): -1 for identity in identities}, code=code, message=message)

    def _tell(self, change: str, host: str, node_rank: int | None) -> None:
        if self.world is not None:
            self.world.event("member", change=change, host=host, node_rank=node_rank)

    def _rank_for(self, hello: Hello, given: int | None) -> int | None:
        """The seat for a newcomer that would like a given one; None: it waits for one."""
        taken, free = self._taken_ranks(), self._free_ranks()
        if not self._complete and given is not None and given in taken:
            raise ConfigError(
                "launcher.node_rank",
                given,
                f"{taken[given]} and {hello.host} both call themselves node {given}",
                "give each node a rank of its own, or none",
            )
        if not self._has_room():
            raise ConfigError(
                "launcher.nnodes",
                self.nnodes,
                f"{hello.host} is one node too many: there are {', '.join(taken.values())}",
                f"launcher.nnodes={self.nnodes + 1}, or start fewer",
            )
        if given in free:
            return given
        wants_none = given is not None and given >= self.nnodes
        return None if wants_none or not free else free[0]

    def gather(self) -> None:
        """Wait until every node is there, or enough of them for long enough.

        Raises:
            ConfigError: a node does not fit.
            Incomplete: too few came in time, or somebody asked to stop.
        """
        self.poll()
        self._drop_lost()
        began = said = time.monotonic()
        while not self._enough(time.monotonic() - began):
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

    def _enough(self, waited: float) -> bool:
        """Whether those who are here may start, after so many seconds."""
        here = 1 + len(self.members)
        if here >= self.nnodes or here < self.least:
            return here >= self.nnodes
        # A node that the run has gone on without is not waited for again at every restart.
        expected = self.nnodes - here <= self._given_up
        return expected or waited > (self._rejoin if self._complete else self._join_timeout)

    def _drop_lost(self) -> None:
        self._drop(member for member in list(self.members.values()) if member.lost)

    def _drop(self, gone: Iterable[Member]) -> None:
        gone = list(gone)
        for member in gone:
            del self.members[member.id]
            self._tell("lost", member.hello.host, member.node_rank)
        if gone:  # should one of them be alive after all
            why = next((ConfigError(*m.status.error) for m in gone if m.status.error is not None), None)
            default = (
                "node 0 had not heard from this node for too long and goes on without it; start it again"
            )
            self._send_away((member.id for member in gone), EXIT_GAVE_UP, str(why or default))

    def _missing(self) -> str:
        here = self._taken_ranks()
        absent = [str(rank) for rank in self._free_ranks()]
        shown = ", ".join(absent[:8]) + (" …" if len(absent) > 8 else "")
        told = [f"{rank} ({host})" for rank, host in sorted(here.items())]
        present = ", ".join(told[:8]) + (" …" if len(told) > 8 else "")
        fewest = f", at least {self.least}" if self.least < self.nnodes else ""
        return f"node {shown} of {self.nnodes}{fewest} (here: {present})"

    def prepare(self, run_dir: Path) -> None:
        """Let every node look at the run directory and get the data.

        Raises:
            ConfigError: one cannot, or was lost meanwhile; the message names its host.
            Incomplete: somebody asked to stop.
        """
        self._begin_to_prepare(run_dir)
        # Spares prepare themselves meanwhile.
        new = [m for m in self.members.values() if m.node_rank is not None and not m.status.ready]
        while not all(member.status.ready for member in new):
            time.sleep(_POLL_SECONDS)
            self.poll()
            for member in new:
                if self._complete and (member.lost or member.status.error is not None):
                    return  # a newcomer: the run goes on without it
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

    def _begin_to_prepare(self, run_dir: Path) -> None:
        new = [member for member in self.members.values() if not member.status.ready and not member.preparing]
        if not new:
            return
        if not self._token:
            self._token = secrets.token_hex(8)
            (run_dir / TOKEN_FILE).write_text(self._token)
        for member in new:
            member.preparing = True
        self.order("prepare", ranks=ranks_of(new), run_dir=str(run_dir), token=self._token)
        self._tell_roster()

    def assemble(self, run_dir: Path) -> None:
        """See enough nodes there and ready, and deal the seats, before a generation starts.

        Raises:
            Incomplete: they are not, for whatever reason; or somebody asked to stop.
        """
        before, grows = self.seated, self._grows
        self.seated, self._grows, self._running = [], False, False
        try:
            while True:
                self.gather()
                self._deal_seats()
                self.prepare(run_dir)
                others = [member for member in self.members.values() if member.node_rank is not None]
                able = all(member.status.ready and not member.lost for member in others)
                if able and (self._charge is None or self._charge.confirm(self._say)):
                    break
        except ConfigError as error:
            raise Incomplete(str(error)) from error
        self.seated = sorted(others, key=lambda member: member.node_rank or 0)
        for member in self.seated:
            if self._complete and member not in before and (member.spare or grows):
                self._tell("spare" if member.spare else "taken_in", member.hello.host, member.node_rank)
            member.spare = False
            self._been.add(member.hello.host)
        self._complete = True
        self._tell_roster()

    def _tell_roster(self) -> None:
        """Tell everyone who takes over from this node, in order."""
        if self._charge is None:
            return
        everyone = sorted(self.members.values(), key=lambda m: (m.node_rank is None, m.node_rank or 0, m.id))
        self.order(
            "roster",
            run_dir=str(self._charge.world.run.path),
            roster=[[m.id, m.hello.host, _SPARE if m.node_rank is None else m.node_rank] for m in everyone],
            term=asdict(self._charge.term),
        )

    def _deal_seats(self) -> None:
        """Choose the layout for who is there, and give each of them a seat in it."""
        if self.world is None:
            return
        config = self.world.fit(min(self.nnodes, 1 + len(self.members)))
        nodes = num_nodes(config.launcher)
        ranks = assign({member.id: member.node_rank for member in self.members.values()}, nodes)
        missing = f"without {self._missing()}"
        for member in self.members.values():
            member.node_rank = ranks.get(member.id)
        fewer = nodes < num_nodes(self.world.config.launcher)
        self.world.take(config, missing if fewer else "nodes have come back")
        self._given_up = self.nnodes - nodes

    def due_to_regroup(self) -> str | None:
        """Why the workers are to save and start again in a bigger world; None where there is no reason to."""
        if self.world is None or len(self.seated) + 1 >= self.nnodes or not self._idle():
            return None
        self._begin_to_prepare(self.world.run.path)
        ready = [member for member in self._idle() if member.status.ready]
        now = time.monotonic()
        if not ready or now - self._checkpoints_at < _CHECKPOINT_SECONDS:
            return None
        self._checkpoints_at = now
        nodes = len(self.seated) + 1
        if num_nodes(self.world.fit(min(self.nnodes, nodes + len(ready))).launcher) <= nodes:
            return None
        newest = self.world.run.newest_checkpoint()
        if self.world.full.checkpoint.every and all(member.checkpoint == newest for member in ready):
            return None
        self._grows = True
        return f"{', '.join(member.hello.host for member in ready)} can be taken in"

    def blame(self, failure: Failure) -> None:
        """Count a failure against its host; one with too many does not work in the next generation."""
        self.poll()  # a spare may have come in this very moment
        host = failure.host
        mine = [member for member in self.members.values() if member.hello.host == host]
        if failure.kind not in _HOST_KINDS or not self._offences.add(host, time.time()):
            return
        leads = host == self._mine.host
        able = [m for m in self.members.values() if m not in mine and not m.lost]
        if len(able) + (not leads) < self.least:
            self._say(f"{host} fails again and again, but the run cannot go on with fewer nodes.")
            return
        why = f"{host} failed too often within an hour (resilience.host_failures) and is left out of the run"
        if leads:
            self.wait_done(self.order("succeed", message=why))
            raise Deposed(why)
        self._excluded[host] = why
        self._say(why)
        for member in mine:
            del self.members[member.id]
            self._tell("excluded", host, member.node_rank)
        self._given_up += len(mine)
        self._send_away((member.id for member in mine), EXIT_GAVE_UP, why)

    # -- what they are told -------------------------------------------------------------------------------

    def order(self, do: str, ranks: dict[str, int] | None = None, **fields: object) -> int:
        """Tell every node, or those in ``ranks``. Returns how many orders there are now."""
        meant = ranks_of(self.members.values()) if ranks is None else ranks
        order = Order(do, meant, **fields)  # type: ignore[arg-type]
        self._store.set(f"order/{self._orders}", json.dumps(asdict(order)))
        self._orders = self._store.add("orders", 1)
        return self._orders

    def wait_done(self, orders: int) -> None:
        """Wait until all who can be heard have carried out so many orders; who does not is lost.

        A newcomer may still be busy with the data, and has nothing to carry out.
        """
        until = time.monotonic() + self.node_timeout
        able = [member for member in self.members.values() if member.status.ready]
        while waiting := [
            member for member in able if not member.lost and member.status.orders_done < orders
        ]:
            for member in waiting:
                silent = member.silent_seconds > min(_DEAF_SECONDS, self.node_timeout)
                member.lost = silent or time.monotonic() > until
            time.sleep(_POLL_SECONDS)
            self.poll()

    def start(self, generation: int, run_dir: Path, check_exchanges: bool) -> None:
        """Tell those with a seat to start their workers."""
        self._running = True
        self.order(
            "start",
            ranks=ranks_of(self.seated),
            generation=generation,
            run_dir=str(run_dir),
            check_exchanges=check_exchanges,
            num_nodes=len(self.seated) + 1,
        )

    def asked_to_stop(self) -> str | None:
        """The signal that another node was given, with the node's name. A node without work just leaves."""
        for member in self.seated if self._running else self.members.values():
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
def lead(
    config: RunConfig,
    mine: Hello,
    say: Callable[[str], None],
    store: dist.Store | None = None,
    inheritance: Inheritance | None = None,
) -> Iterator[Cluster]:
    """Host the control store and wait for the other nodes; at the end they are told how it ended.

    Args:
        mine: with the address and port of the store.
        store: hosted already; who takes over has one.

    Raises:
        ConfigError: the port is taken, a node does not fit or does not come.
        Deposed: another node leads.
    """
    launcher = config.launcher
    store = store or serve(mine.address, mine.port, "launcher.master_port")
    cluster = Cluster(store, mine, config, say, inheritance)
    outcome, deposed = Outcome(EXIT_STOPPED, "Node 0 ended without a word."), False
    try:
        try:
            if inheritance is None:
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
    except Deposed:
        deposed = True
        raise
    except ConfigError as error:
        outcome = Outcome(EXIT_CONFIG, str(error))
        raise
    except BaseException as error:
        outcome = Outcome(EXIT_STOPPED, f"{mine.host}: {type(error).__name__} {error}".rstrip())
        raise
    finally:
        if not deposed:  # else they follow another
            cluster.dismiss(outcome)
        cluster.end()
