"""Which state all ranks go on from: the newest that is complete over all of them, in any tier. Torch-free.

Every rank says what it can give; from the same ballots every rank finds the same choice. Then each verifies its
part. Where one cannot, the state is struck off its ballot and all vote again, so each round ends the vote or
shortens a ballot.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.checkpoint.timeline import Timelines


class Tier(enum.Enum):
    """Where a state is, cheapest first."""

    memory = "memory"
    peer = "peer"
    durable = "durable"


@dataclass(frozen=True, order=True)
class Snapshot:
    """A state by its step and timeline: two of the same are the same bits."""

    step: int
    timeline: int


@dataclass(frozen=True)
class Ballot:
    """What one rank can give.

    Attributes:
        run: of the snapshots (:class:`trainer.checkpoint.timeline.Timelines`).
        layout: fingerprint of what this rank holds of the model; a snapshot of another does not fit.
        own: sealed snapshots in this machine's memory.
        held: sealed copies of other ranks' snapshots, by rank, with the fingerprint of their layout.
        durable: committed checkpoints (rank 0 alone says so).
    """

    run: str
    layout: str
    own: tuple[Snapshot, ...] = ()
    held: Mapping[int, tuple[tuple[Snapshot, str], ...]] = field(default_factory=dict)
    durable: tuple[Snapshot, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What was agreed on.

    Attributes:
        holders: for each rank the rank whose memory has its snapshot (itself, mostly); empty for checkpoints.
    """

    snapshot: Snapshot
    tier: Tier
    holders: tuple[int, ...] = ()


def choose(ballots: Sequence[Ballot], timelines: Timelines, at_most: int | None = None) -> Choice | None:
    """The newest state that is complete and counts; of the same step the cheapest tier.

    Args:
        ballots: of every rank, in their order.
        timelines: of the run.
        at_most: no later step than this.
    """

    def counts(snapshot: Snapshot) -> bool:
        allowed = at_most is None or snapshot.step <= at_most
        return allowed and timelines.counts(snapshot.step, snapshot.timeline)

    best: Choice | None = None
    for snapshot in sorted(filter(counts, ballots[0].durable), reverse=True)[:1]:
        best = Choice(snapshot, Tier.durable)
    offered = {snapshot for ballot in ballots for snapshot in ballot.own}
    offered |= {item for ballot in ballots for copies in ballot.held.values() for item, _ in copies}
    for snapshot in sorted(filter(counts, offered), reverse=True):
        if best is not None and snapshot.step < best.snapshot.step:
            break
        holders = _holders(snapshot, ballots, timelines.run)
        if holders is not None:
            tier = Tier.memory if holders == tuple(range(len(ballots))) else Tier.peer
            return Choice(snapshot, tier, holders)
    return best


def _holders(snapshot: Snapshot, ballots: Sequence[Ballot], run: str) -> tuple[int, ...] | None:
    """Who has each rank's part; None where some rank's is nowhere."""
    found = []
    for rank, ballot in enumerate(ballots):
        if ballot.run == run and snapshot in ballot.own:
            found.append(rank)
            continue
        holder = next(
            (
                other
                for other, theirs in enumerate(ballots)
                if theirs.run == run and (snapshot, ballot.layout) in theirs.held.get(rank, ())
            ),
            None,
        )
        if holder is None:
            return None
        found.append(holder)
    return tuple(found)
