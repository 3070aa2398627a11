"""The workers of one generation on all nodes, as one group for node 0's agent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from launch.cluster import Cluster, Member
from launch.failure import Failure, origin
from launch.workers import Plan, WorkerGroup
from trainer.config import RunConfig

_SILENT_SECONDS = 2.0
"""A node that has not been heard for so long is suspected when something else has already failed."""


def starter(
    cluster: Cluster, plan: Callable[[RunConfig], Plan], run_dir: Path
) -> Callable[[int, bool], AbstractContextManager[ClusterGroup]]:
    """What starts the workers of a generation on all nodes. See :class:`launch.agent.Agent`.

    Args:
        plan: what node 0 starts in a layout.
    """

    @contextmanager
    def start(generation: int, check_exchanges: bool) -> Iterator[ClusterGroup]:
        cluster.assemble(run_dir)
        cluster.start(generation, run_dir, check_exchanges)
        assert cluster.world is not None
        with WorkerGroup(plan(cluster.world.config), run_dir, generation, check_exchanges) as own:
            group = ClusterGroup(cluster, own)
            try:
                yield group
            finally:
                group.kill()

    return start


class ClusterGroup:
    """One generation's workers on all nodes. See :class:`launch.agent.Group`."""

    settle_seconds = 2 * _SILENT_SECONDS

    def __init__(self, cluster: Cluster, own: WorkerGroup) -> None:
        self._cluster, self._own = cluster, own
        self._killed = False
        self._others: list[Member] = cluster.seated

    def codes(self) -> list[int | None]:
        if not self._killed:
            self._cluster.poll()
        found = self._own.codes()
        for member in self._others:
            count = member.hello.num_workers
            told = member.status.codes if member.status.generation == self._own.generation else []
            found += [-9] * count if member.lost and None in (told or [None]) else told or [None] * count
        return found

    def failure(self) -> Failure | None:
        found = [failure for failure in [self._own.failure()] if failure is not None]
        for member in self._others:
            if member.status.generation == self._own.generation and member.failure is not None:
                found.append(member.failure)
        suspect = origin(found)
        if suspect is None or not suspect.certain:
            lost = next((member for member in self._others if _is_gone(member)), None)
            if lost is not None:
                return _lost(lost)
        return suspect

    def committed(self) -> int | None:
        return self._own.committed()

    def asked_to_stop(self) -> str | None:
        return self._cluster.asked_to_stop()

    def regroup(self) -> str | None:
        return self._cluster.due_to_regroup()

    def terminate(self) -> None:
        self._cluster.order("terminate")
        self._own.terminate()

    def kill(self) -> None:
        if self._killed:
            return
        orders = self._cluster.order("kill", generation=self._own.generation)
        self._own.kill()
        self._cluster.wait_done(orders)
        self._killed = True


def _is_gone(member: Member) -> bool:
    return member.lost or member.silent_seconds > _SILENT_SECONDS


def _lost(member: Member) -> Failure:
    how = "left" if member.status.left else f"has not been heard for {member.silent_seconds:.0f} s"
    rank = (member.node_rank or 0) * member.hello.num_workers
    cause, now = f"{member.name} {how}", time.time()
    began = now - member.silent_seconds
    return Failure(rank, member.hello.host, "node-lost", cause, 1, now, True, "", "", began)
