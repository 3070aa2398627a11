"""An agent's charge of a run: the term that it holds, what it has inherited, and the run's layouts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from launch.seats import Offences
from launch.world import World
from parallel.errors import ConfigError
from trainer.config import RunConfig, require
from trainer.metrics.jsonl import read_events
from trainer.metrics.schema import EVENTS_FILE
from trainer.rundir import RunDirectory
from trainer.terms import Lease, Term, open_terms


class Deposed(Exception):
    """This agent leads no longer: it ends its workers and leaves. The message says why."""


@dataclass(frozen=True)
class Inheritance:
    """What an agent that takes over knows of the leader before it.

    Attributes:
        why: it is gone.
        since: unix time since when.
        peers: host → node rank of those who worked for it, or waited to; a spare's is beyond all seats.
        excluded: its host is not let in again.
    """

    term: Term
    leader: str
    why: str
    since: float
    peers: dict[str, int]
    excluded: bool


class Charge:
    """Held from :meth:`begin` to :meth:`end`.

    Args:
        host, address, port: of this agent, and its store.
        inheritance: None: the first leader of this start of the run.

    Raises (from the constructor):
        ConfigError: another agent has claimed the term, or it cannot be claimed.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: RunConfig,
        mine: tuple[str, str, int],
        inheritance: Inheritance | None,
    ) -> None:
        self.world = World(run, config)
        terms = open_terms(config.launcher.rendezvous, run.path)
        try:
            newest = terms.newest()
            number = 1 if newest is None else newest.number + 1
            term = Term(number, *mine) if inheritance is None else inheritance.term
            claimed = inheritance is not None or terms.claim(term)
        except OSError as error:
            raise ConfigError(
                "launcher.rendezvous",
                config.launcher.rendezvous,
                f"the term cannot be written there: {error}",
                "an etcd that this host can reach, or null for the run directory",
            ) from None
        require(claimed, "RUN_DIR", run.path, "another agent has begun to lead this run", "wait for it")
        self.term = term
        self._lease = Lease(terms, term, config.resilience.node_timeout_seconds)

    def take_over(self, given: Inheritance, offences: Offences) -> None:
        """Tell what has become of the leader before, and know again what hosts have done.

        Args:
            offences: filled from the run's events.
        """
        run, now = self.world.run, time.time()
        for event in read_events(run.path / EVENTS_FILE):
            if event["event"] == "failure":
                offences.add(str(event["host"]), event["time"])
        if not given.excluded:
            self.world.event(
                "failure",
                kind="node-lost",
                rank=0,
                host=given.leader,
                cause=f"node 0 ({given.leader}): {given.why}",
                evidence="",
                generation=run.next_generation() - 1,
                exit_code=1,
                log="",
                began=given.since,
            )
            offences.add(given.leader, now)
        change = "excluded" if given.excluded else "lost"
        self.world.event("member", change=change, host=given.leader, node_rank=0)
        self.world.event("leader", host=self.term.host, term=self.term.number, reason=given.why)

    def hold(self, alone: bool) -> None:
        """Raise Deposed if another agent leads now. ``alone``: see :meth:`trainer.terms.Lease.lost`."""
        lost = self._lease.lost(alone)
        if lost is not None:
            raise Deposed(lost)

    def confirm(self, say: Callable[[str], None]) -> bool:
        """Look at the term itself: two leaders must not start workers. False: it cannot be reached now.

        Raises:
            Deposed: another agent leads.
        """
        try:
            self._lease.check()
        except OSError as error:
            say(f"launcher.rendezvous cannot be reached: {error}")
            time.sleep(1.0)
            return False
        self.hold(alone=True)
        return True

    def end(self) -> None:
        """Let go of the term."""
        self._lease.end()
