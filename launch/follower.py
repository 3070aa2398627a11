"""A node other than node 0: it joins, and does what node 0's agent orders until it is told to leave, or leads."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.agent import StopRequest
from launch.charge import Inheritance
from launch.cluster import TOKEN_FILE, lead
from launch.control import Hello, Link, Order
from launch.failure import has_failed
from launch.local import check_data, run_here, worker_plan
from launch.outcome import EXIT_GAVE_UP, EXIT_STOPPED, Outcome
from launch.standby import Standby, standby_for
from launch.succession import CutOff, Standing, settle
from launch.workers import WorkerGroup
from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.config_launcher import num_hosts, num_nodes
from trainer.network import connect
from trainer.rundir import RunDirectory
from trainer.terms import Term, open_terms

if TYPE_CHECKING:
    import torch.distributed as dist

_POLL_SECONDS = 0.05
_SHARED_SECONDS = 20.0
_ANSWER_SECONDS = 15.0
"""How long node 0 may take to answer a request to stop before there is anything to save."""


def follow(
    config: RunConfig, mine: Hello, console: Console, own_store: dist.TCPStore, leader: Term | None
) -> Outcome:
    """Join a run and work for its leader. When that is lost, work for the next one, or be it.

    Args:
        config: as this node resolved it; the leader's is the one that is run.
        own_store: hosted here, for the day when this node leads.
        leader: who has taken over; None: node 0.

    Returns:
        The leader's outcome, or this node's own.

    Raises:
        ConfigError: node 0 cannot be reached.
        Deposed: this node had taken over, and has lost its term.
    """
    launcher, timeout = config.launcher, config.resilience.node_timeout_seconds
    node_0 = (str(launcher.master_addr), launcher.master_port)
    place = node_0 if leader is None else (leader.address, leader.port)
    patience = timeout + launcher.join_timeout_seconds

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    follower: Follower | None = None
    try:
        while True:
            try:
                store = connect(*place, launcher.join_timeout_seconds, "launcher.master_addr", say)
            except ConfigError:
                if follower is None:
                    raise
                return follower.lost()
            link = Link(store, mine, num_hosts(launcher), timeout)
            say(f"Joined {place[0]}:{place[1]}; waiting for the other nodes.")
            follower = Follower(link, place, console, None if follower is None else follower.standby)
            try:
                outcome = follower.run()
            finally:
                follower.end()
            if outcome is not None or follower.standing is None:
                return outcome or follower.lost()
            say(f"Node 0 ({follower.standing.leader.host}) is lost: {follower.why_lost}.")
            full = RunDirectory(follower.standing.run_dir).full_config()
            try:
                term = _settle(follower, full, mine, patience)
            except CutOff:
                return follower.lost()
            if (term.address, term.port) == (mine.address, mine.port):
                say(f"This node leads now (term {term.number}).")
                return _take_over(follower, term, full, replace(mine, node_rank=0), own_store, console, say)
            say(f"{term.host} leads now (term {term.number}).")
            place = (term.address, term.port)
    finally:
        if follower is not None and follower.standby is not None:
            follower.standby.close()


def _settle(follower: Follower, full: RunConfig, mine: Hello, patience: float) -> Term:
    """Who leads now. Raises CutOff."""
    assert follower.standing is not None
    terms = open_terms(full.launcher.rendezvous, follower.standing.run_dir)
    me = Term(0, mine.host, mine.address, mine.port)
    silence = full.resilience.node_timeout_seconds
    return settle(follower.standing, terms, me, silence, patience, follower.abdicated)


def _take_over(
    follower: Follower,
    term: Term,
    full: RunConfig,
    mine: Hello,
    store: dist.TCPStore,
    console: Console,
    say: Callable[[str], None],
) -> Outcome:
    """Lead the run that this node has worked for."""
    standing = follower.standing
    assert standing is not None
    given = Inheritance(
        term=term,
        leader=standing.leader.host,
        why=follower.why_lost,
        since=follower.lost_since,
        peers=standing.peers,
        excluded=follower.abdicated,
    )
    with lead(full, mine, say, store, given) as cluster:
        cluster.outcome = run_here(RunDirectory(standing.run_dir), full, console, cluster, follower.standby)
        return cluster.outcome


class Follower:
    """Carries out a leader's orders.

    Args:
        link: to the leader's store.
        place: address and port of that.

    Attributes:
        standby: of this node, made when the data is; who makes this object closes it.
        standing: in the order of succession; None until the leader has told it.
        why_lost: the leader, once ``run`` has returned None.
        lost_since: unix time of its last sign of life.
        abdicated: it said that it leaves.
    """

    def __init__(
        self, link: Link, place: tuple[str, int], console: Console, standby: Standby | None = None
    ) -> None:
        self.standby = standby
        self._link, self._place, self._console = link, place, console
        self._status = link.status
        self._group: WorkerGroup | None = None
        self._stop = StopRequest()
        self._deadline: float | None = None
        self.standing: Standing | None = None
        self.why_lost, self.abdicated, self.lost_since = "", False, 0.0

    def run(self) -> Outcome | None:
        """Until the leader says how it ended; None: it is gone."""
        outcome = self._until("start")  # not listening to signals yet: Ctrl-C just ends this
        if outcome is not None or self._is_lost():
            return outcome
        with self._stop.listening():
            while not self._is_lost():
                outcome = self._turn()
                if outcome is not None:
                    return outcome
                time.sleep(_POLL_SECONDS)
        return Outcome(EXIT_STOPPED, "Stopped at once.") if self._stop.cause is not None else None

    def _is_lost(self) -> bool:
        # What the leader said last still counts: it may have been that everyone leaves.
        if not self.why_lost and self._link.lost is not None and not self._link.orders:
            self.why_lost = self._link.lost
            self.lost_since = time.time() - self._link.silent_seconds
        return bool(self.why_lost)

    def end(self) -> None:
        """Kill what still runs here, and tell node 0."""
        if self._group is not None:
            self._group.kill()
        self._status.left = True
        self._link.tell(self._status)
        self._link.close()

    def _until(self, do: str) -> Outcome | None:
        """Carry out orders up to the first of this kind, which is left for later."""
        while True:
            if self._is_lost():
                return None
            if self._link.orders:
                if self._link.orders[0].do == do and self._is_meant(self._link.orders[0]):
                    return None
                outcome = self._carry_out(self._link.orders.popleft())
                if outcome is not None:
                    return outcome
            time.sleep(_POLL_SECONDS)

    def _turn(self) -> Outcome | None:
        while self._link.orders:
            outcome = self._carry_out(self._link.orders.popleft())
            if outcome is not None:
                return outcome
        self._watch()
        if self._stop.cause is not None and self._status.stopping is None:
            self._say(f"{self._stop.cause}: saving, then stopping. Ctrl-C again stops at once.")
            self._status.stopping = self._stop.cause
            if self._group is None:  # else the leader answers when all is saved, however long that takes
                self._deadline = time.monotonic() + _ANSWER_SECONDS
        self._link.tell(self._status)
        if self._stop.now or (self._deadline is not None and time.monotonic() > self._deadline):
            return Outcome(EXIT_STOPPED, "Stopped at once.")
        return None

    def _watch(self) -> None:
        """Note how this node's workers fare."""
        if self._group is None:
            return
        status = self._status
        status.codes = self._group.codes()
        if has_failed(status.codes) and not (status.failure is not None and status.failure.certain):
            status.failure = self._group.failure()
            if status.failure is not None:
                status.failure_age = time.time() - status.failure.time

    def _is_meant(self, order: Order) -> bool:
        return str(self._link.id) in order.ranks

    def _carry_out(self, order: Order) -> Outcome | None:
        if self._is_meant(order):
            if order.do == "leave":
                self._status.orders_done += 1
                return Outcome(order.code, order.message)
            if order.do == "prepare":
                self._prepare(order)
            elif order.do == "start":
                self._start(order)
            elif order.do == "roster":
                position = [entry[0] for entry in order.roster].index(self._link.id)
                peers = {host: rank for _, host, rank in order.roster}
                self.standing = Standing(Path(order.run_dir), Term(**order.term), position, peers)
            elif order.do == "succeed":
                self.why_lost, self.abdicated, self.lost_since = order.message, True, time.time()
            elif order.do == "terminate" and self._group is not None:
                self._group.terminate()
            elif order.do == "kill" and self._group is not None:
                self._group.kill()
                self._watch()
                self._group = None
        self._status.orders_done += 1
        self._link.tell(self._status)
        return None

    def _prepare(self, order: Order) -> None:
        try:
            _see(Path(order.run_dir), order.token)
            config = RunDirectory(Path(order.run_dir)).config()
            if self.standby is None:
                self.standby = standby_for(config, Path(order.run_dir), self._say)
            check_data(config, self._console)
            if self.standby is not None:
                self.standby.prepare()  # now, when no other order can be late
            self._status.ready = True
        except ConfigError as error:
            self._status.error = [error.field, str(error.value), error.relation, error.fix]

    def _start(self, order: Order) -> None:
        rank = order.ranks[str(self._link.id)]
        run = RunDirectory(Path(order.run_dir))
        config = _config_for(run, order.num_nodes)
        plan = worker_plan(run, config, rank, self._place[1], self._place[0])
        plan = replace(plan, standby=self.standby)
        first, last = plan.first_rank, plan.first_rank + plan.num_workers - 1
        self._say(f"Node {rank}: ranks {first}-{last} of {run.path} start (generation {order.generation}).")
        self._deadline = None
        self._group = WorkerGroup(plan, run.path, order.generation, order.check_exchanges)
        self._status.generation, self._status.failure = order.generation, None
        self._status.codes = self._group.codes()

    def lost(self) -> Outcome:
        """How the command ends where nobody takes over."""
        place = f"{self._place[0]}:{self._place[1]}"
        return Outcome(
            EXIT_GAVE_UP,
            f"Node 0 ({place}) is lost: {self.why_lost}. The workers here were ended; the run goes on from its "
            "newest checkpoint when all nodes are started again.",
        )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def _config_for(run: RunDirectory, nodes: int) -> RunConfig:
    """The config in force, once it is the one for so many nodes: network file systems cache for a while."""
    until = time.monotonic() + _SHARED_SECONDS
    while True:
        config = run.config()
        if num_nodes(config.launcher) == nodes or time.monotonic() > until:
            return config
        time.sleep(0.2)


def _see(run_dir: Path, token: str) -> None:
    """Raise ConfigError unless this host sees in the run directory what node 0 has just written there."""
    until = time.monotonic() + _SHARED_SECONDS  # network file systems cache for a while
    while True:
        try:
            if (run_dir / TOKEN_FILE).read_text() == token:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise ConfigError(
                "run.root",
                run_dir,
                f"every node must see the same run directory; {socket.gethostname()} cannot see what node 0 wrote "
                f"to {TOKEN_FILE} there",
                "run.root=DIRECTORY on a file system that all nodes share",
            )
        time.sleep(0.2)
