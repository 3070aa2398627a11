"""What the others do when node 0 cannot be heard any more: one of them takes its place.

Every agent hosts a store of its own from the beginning and tells its address; nobody needs it until its agent
leads. Node 0 tells everyone in which order they stand (the roster). When it is gone, the first of them that lives
claims the next term (trainer/terms.py); the others read there whom to follow. Who is merely cut off from a leader
that lives does not take over: the leader's beat at the place of the terms tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config import RunConfig
from trainer.network import probe
from trainer.rundir import RunDirectory
from trainer.terms import Term, Terms, open_terms

_POLL_SECONDS = 0.2
_PROBE_SECONDS = 1.0
_STAGGER_SECONDS = 3.0
"""How much later than the one before it in the roster an agent claims the term."""
_BEAT_SECONDS = 2.5
"""A leader that lives shows a beat within this time."""


@dataclass(frozen=True)
class Standing:
    """What a node must know when its leader is gone.

    Attributes:
        leader: the term under which it worked.
        position: its own in the order of succession, from 0.
        peers: host → node rank of everyone in it.
    """

    run_dir: Path
    leader: Term
    position: int
    peers: dict[str, int]


class CutOff(Exception):
    """The leader lives, or may, and this node cannot reach it, nor anyone that has taken over."""


def settle(
    standing: Standing, terms: Terms, mine: Term, silence: float, patience: float, abdicated: bool
) -> Term:
    """Find out who leads now: the same leader, another, or this agent.

    Args:
        mine: this agent's host, address and port; the number is filled in.
        silence: seconds without a beat after which the leader is gone.
        patience: seconds after which this node gives up.
        abdicated: the leader said that it leaves.

    Returns:
        The term to follow; it is this agent's own where the address and port are.

    Raises:
        CutOff: nobody was found in time.
    """
    began = time.monotonic()
    old = standing.leader
    beat, seen, beats = None, began, False
    gone: float | None = began if abdicated else None
    while time.monotonic() - began < patience:
        with suppress(OSError):
            newest, latest = terms.newest(), terms.last_beat()
            now = time.monotonic()
            if newest is not None and newest.number > old.number:
                return newest
            if latest != beat:
                beat, seen, beats = latest, now, beat is not None
            why = probe(old.address, old.port, _PROBE_SECONDS) if gone is None else None
            if gone is None and beats and why is None:
                return old
            # A port that refuses tells that its process has ended; a firewall may say the same of one that lives.
            limit = min(silence, _BEAT_SECONDS) if why is not None and why.startswith("refused") else silence
            if gone is None and now - seen > limit:
                gone = now
            if gone is not None and now - gone >= standing.position * _STAGGER_SECONDS:
                claimed = replace(mine, number=old.number + 1)
                if terms.claim(claimed):
                    return claimed
        time.sleep(_POLL_SECONDS)
    raise CutOff


def find_leader(config: RunConfig) -> Term | None:
    """Who leads the run now: for a node that comes back. None: nobody, or it is not known."""
    if config.run.id is None:
        return None
    with suppress(OSError):
        terms = open_terms(config.launcher.rendezvous, RunDirectory.of(config).path)
        found = terms.newest()
        there = found is not None and probe(found.address, found.port, _PROBE_SECONDS) is None
        if there and _within(_BEAT_SECONDS, terms.last_beat):
            return found
    return None


def _within(seconds: float, look: Callable[[], str]) -> bool:
    """Whether what is looked at changes in this time."""
    first, until = look(), time.monotonic() + seconds
    while time.monotonic() < until:
        if look() != first:
            return True
        time.sleep(_POLL_SECONDS)
    return False
