"""Who sits where in the next generation, and who is not let in any more. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

OFFENCE_SECONDS = 3600.0


def assign(ranks: Mapping[int, int | None], num_seats: int) -> dict[int, int]:
    """Node ranks of the next generation; node 0 is the leader's and not dealt here.

    Who has a seat keeps it where it still is one, so that a lost node's successor finds the same shards there. The
    free ones go to those whose seats are gone, then to those without, in order of arrival.

    Args:
        ranks: agent id → node rank so far; None: none yet.
        num_seats: nodes of the generation, node 0 included.

    Returns:
        Agent id → node rank of those who have a seat: as many as there are, 1 … num_seats − 1.
    """
    taken = {identity: rank for identity, rank in ranks.items() if rank is not None and 0 < rank < num_seats}
    free = [rank for rank in range(1, num_seats) if rank not in taken.values()]
    waiting = [identity for identity in ranks if identity not in taken]
    waiting.sort(key=lambda identity: (ranks[identity] is None, ranks[identity] or 0, identity))
    return taken | dict(zip(waiting, free, strict=False))


class Offences:
    """Failures by host; a host with too many within an hour is excluded.

    Args:
        limit: failures within an hour; 0: never.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._times: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, host: str, now: float) -> bool:
        """Count a failure of a host, ``now`` in seconds; whether it is one too many."""
        recent = [time for time in self._times[host] if now - time < OFFENCE_SECONDS]
        self._times[host] = [*recent, now]
        return 0 < self._limit <= len(self._times[host])
