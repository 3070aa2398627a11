"""Another node, as its leader knows it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from launch.control import Hello, Status
from launch.failure import Failure


@dataclass
class Member:
    """Another node's agent, as last heard of.

    Attributes:
        node_rank: its seat, in this generation or the next; None: it waits for one.
        spare: it came when every seat was taken.
        preparing: it was told to look at the run directory.
        checkpoint: step of the newest one when it came.
        failure: the one in its status, with our clock's time.
        seen: when its beat last grew, by the monotonic clock.
    """

    id: int
    hello: Hello
    node_rank: int | None
    spare: bool = False
    preparing: bool = False
    checkpoint: int | None = None
    status: Status = field(default_factory=Status)
    failure: Failure | None = None
    beat: bytes = b""
    seen: float = field(default_factory=time.monotonic)
    lost: bool = False

    @property
    def name(self) -> str:
        return f"{'a spare' if self.node_rank is None else f'node {self.node_rank}'} ({self.hello.host})"

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


def ranks_of(members: Iterable[Member]) -> dict[str, int]:
    """Agent id → node rank, for an order; -1 for who has no seat."""
    return {str(member.id): -1 if member.node_rank is None else member.node_rank for member in members}
