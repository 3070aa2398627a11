"""Silent corruption: state that changes by itself, replicas that differ, ranks that compute otherwise.

========  ======================================  =====================================  ===================
what      when                                    what it sees                           who is named by
========  ======================================  =====================================  ===================
digests   before each optimizer step, a part      a bit of this rank's weights or        the rank itself
          of the state (``guard.digest_every``)   optimizer that flipped at rest
replicas  every ``guard.replica_every`` steps     any difference between ranks that      majority; of two by
                                                  hold the same                          doing it again
replays   every ``guard.replay_every`` steps      a rank that computes a micro-batch     a third opinion, or
                                                  otherwise than its neighbour           its own second try
========  ======================================  =====================================  ===================
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.dims import ParallelDims
from parallel.engines.base import Engine
from trainer.config import Dtype, RunConfig
from trainer.data.batch import Batch
from trainer.guard.digest import ShardDigests
from trainer.guard.findings import Finding
from trainer.guard.replay import Replay
from trainer.guard.replicas import Odd, Replicas
from trainer.hardware import device_name


@dataclass(frozen=True)
class Corruption:
    """A finding, and the last step whose state is known to be sound: the run goes back to it or before."""

    finding: Finding
    sound: int


class Watch:
    """One rank's watch over the state of all.

    Args:
        config: resolved.
        dims: the layout.
        engine: prepared.
        control: a gloo group over all ranks.
        forward: loss of a batch on this rank, for replays. Collective.
    """

    def __init__(
        self,
        config: RunConfig,
        dims: ParallelDims,
        engine: Engine,
        control: dist.ProcessGroup,
        forward: Callable[[Batch], float],
    ) -> None:
        guard = config.guard
        self.config, self.control = guard, control
        device = next(engine.model.parameters()).device
        places = _gather(control, (socket.gethostname(), device_name(device)))
        self._hosts = [host for host, _ in places]
        self._digests = ShardDigests(engine, guard.digest_every) if guard.digest_every else None
        replicas = Replicas(engine, control) if guard.replica_every and dims.world_size > 1 else None
        self._replicas = replicas if replicas is not None and replicas.exist else None
        self._disputes: tuple[int, list[Odd]] | None = None
        self._replay: Replay | None = None
        if guard.replay_every and dims.dp > 1:
            peers = sorted(range(dims.world_size), key=dims.dp_rank)
            # Processors of different types round otherwise, and so do products of rows in another order.
            exact = dims.ep == 1 and len({name for _, name in places}) == 1
            tolerance = 0.0 if exact else 1e-5 if config.train.dtype is Dtype.fp32 else 1e-3
            self._replay = Replay(peers, dims.dp_rank(dist.get_rank(control)), control, forward, tolerance)
        self._sound_replicas = self._sound_replays = 0

    def begin(self, step: int) -> None:
        """The state was loaded, or made: that of ``step`` steps."""
        self._sound_replicas = self._sound_replays = step
        if self._digests is not None:
            self._digests.forget()
            self._digests.take(step)

    def rest(self, step: int) -> None:
        """The optimizer has made step ``step``; until the next one nobody has a right to write."""
        if self._digests is not None:
            self._digests.take(step)

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """But for what is in this context, after ``step`` steps."""
        if self._digests is not None:
            self._digests.settle()
        yield
        self.rest(step)

    def changed(self) -> Tensor | None:
        """Whether somebody did on this rank; see :meth:`trainer.step.Gate.corrupt`."""
        return None if self._digests is None else self._digests.changed()

    def locate(self, step: int, changed: bool) -> Corruption:
        """Which ranks' state changed, and where if that still shows, in the attempt of step ``step``. Collective.

        Args:
            changed: whether this rank's did.
        """
        mine = self._digests.changed_names() if self._digests is not None and changed else []
        gathered = enumerate(_gather(self.control, (changed, mine)))
        found = [(rank, names) for rank, (theirs, names) in gathered if theirs]
        ranks = tuple(rank for rank, _ in found)
        names = sorted({name for _, theirs in found for name in theirs})
        finding = self._finding(ranks, "bits changed between two optimizer steps", ", ".join(names[:8]))
        # State step - 1 was kept after its digest was taken, maybe after the flip.
        return Corruption(finding, max(0, step - 2))

    def compare(self, step: int, batch: Batch) -> list[Corruption]:
        """Replicas, and a replay of this rank's micro-batch, after ``step`` steps where they are due. Collective.

        Returns:
            What is wrong now. The same on every rank.
        """
        found = []
        if self._replicas is not None and step and step % self.config.replica_every == 0:
            found += self._compare_replicas(self._replicas, step)
        if self._replay is not None and step and step % self.config.replay_every == 0:
            suspect = self._replay.check(batch)
            if suspect is None:
                self._sound_replays = step
            else:
                ranks = tuple(self._replay.peers[place] for place in suspect.ranks)
                found.append(Corruption(self._finding(ranks, suspect.what), self._sound_replays))
        return found

    def _compare_replicas(self, replicas: Replicas, step: int) -> list[Corruption]:
        odd = replicas.compare()
        if odd:
            self._disputes = (step, [group for group in odd if not group.known])
            return [Corruption(self._replica_finding(group), self._sound_replicas) for group in odd]
        self._sound_replicas = step
        return []

    def settled(self, step: int) -> list[Finding]:
        """Who was wrong in a dispute of two replicas after ``step`` steps, now that they were done again."""
        if self._disputes is None or self._disputes[0] != step or self._replicas is None:
            return []
        disputes, self._disputes = self._disputes[1], None
        held = self._replicas.held()
        findings = []
        for group in disputes:
            now = {held[rank][group.number] for rank in group.held}
            wrong = tuple(rank for rank, value in group.held.items() if value not in now)
            if wrong and len(wrong) < len(group.held):
                what = "its replica differed, and from what the same steps gave when they were done again"
                findings.append(self._finding(wrong, what, ", ".join(group.names[:8])))
        return findings

    def _replica_finding(self, group: Odd) -> Finding:
        if group.known:
            return self._finding(
                group.ranks, "its replica differs from the others", ", ".join(group.names[:8])
            )
        what = f"the replicas of ranks {', '.join(map(str, group.held))} differ"
        return Finding("corruption", what, evidence=", ".join(group.names[:8]))

    def _finding(self, ranks: tuple[int, ...], what: str, evidence: str = "") -> Finding:
        if len(ranks) != 1:
            named = f"ranks {', '.join(map(str, ranks))}: {what}" if ranks else what
            return Finding("corruption", named, evidence=evidence)
        return Finding("corruption", what, rank=ranks[0], host=self._hosts[ranks[0]], evidence=evidence)


def _gather(control: dist.ProcessGroup, mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(found, mine, group=control)
    return found
