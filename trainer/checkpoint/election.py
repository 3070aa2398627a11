"""The vote carried out: ballots gathered, what was chosen verified by everyone, and again where one cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer.checkpoint.format import InvalidCheckpoint
from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.peer import Member, PeerTier
from trainer.checkpoint.resume import Checkpoint, candidates, none_valid, open_checkpoint, warn_skipped
from trainer.checkpoint.timeline import Timelines
from trainer.checkpoint.vote import Ballot, Choice, Snapshot, Tier, choose


class Election:
    """One search of all ranks for the state to go on from.

    Args:
        directory: ``<run>/checkpoints``.
        timelines: of the run, the same on every rank.
        control: a group over all ranks for small facts.
        memory: this rank's snapshots; None: off, on every rank.
        peers: what it keeps for other nodes; None: off, on every rank.
        members: where every rank's peer tier listens.

    Attributes:
        checkpoint: what was found, if it is one; verified by rank 0.
        alarms: (kind, message) of what was damaged, on any rank.
    """

    def __init__(
        self,
        directory: Path,
        timelines: Timelines,
        control: dist.ProcessGroup,
        memory: MemoryTier | None,
        peers: PeerTier | None = None,
        members: Sequence[Member] = (),
    ) -> None:
        self.timelines, self.memory, self.peers, self.members = timelines, memory, peers, members
        self.checkpoint: Checkpoint | None = None
        self.alarms: list[tuple[str, str]] = []
        self._directory, self._control = directory, control
        self._rank, self._world_size = dist.get_rank(control), dist.get_world_size(control)
        self._faults: list[InvalidCheckpoint] = []

    def run(
        self, slices: Sequence[StateSlice], rank_tensors: Mapping[str, Tensor], at_most: int | None = None
    ) -> Choice | None:
        """The newest state that is complete and verified; None: there is none. Collective.

        Raises (on rank 0, whose exit ends the others):
            ConfigError: there are checkpoints and none is valid, and no snapshot is either.
        """
        layout = "" if self.memory is None else self.memory.plan(slices, rank_tensors).layout
        durable: Iterator[Checkpoint] = iter(())
        if self._rank == 0:
            durable = candidates(self._directory, self.timelines, self._refuse, at_most)
            self.checkpoint = next(durable, None)
        while True:
            ballots = self._gather(self._ballot(layout))
            choice = choose(ballots, self.timelines, at_most)
            if choice is None:
                if self._faults:
                    raise none_valid(self._directory, self._faults)
                return None
            answers = self._gather(self._verify(choice, layout))
            faults = [fault for fault, _ in answers if fault is not None]
            if not faults:
                return self._settled(choice, answers[0][1])
            self.alarms += [
                ("corrupt_snapshot", fault) for fault in faults if choice.tier is not Tier.durable
            ]
            if self._rank == 0 and choice.tier is Tier.durable:
                self.checkpoint = next(durable, None)
            if self.peers is not None and choice.tier is Tier.peer:
                for rank, (fault, _) in enumerate(answers):
                    if fault is not None and choice.holders[rank] == self._rank != rank:
                        self.peers.drop(rank, choice.snapshot)

    def _ballot(self, layout: str) -> Ballot:
        ballot = Ballot(self.timelines.run, layout)
        if self.memory is not None:
            self.memory.wait()
            ballot = replace(ballot, own=self.memory.offers(self.timelines.run, layout))
        if self.peers is not None:
            self.peers.wait()
            ballot = replace(ballot, held=self.peers.held(self.timelines.run))
        if self.checkpoint is not None:
            ballot = replace(ballot, durable=(Snapshot(self.checkpoint.step, self.checkpoint.timeline),))
        return ballot

    def _verify(self, choice: Choice, layout: str) -> tuple[str | None, str | None]:
        """What is wrong with this rank's part, and from rank 0 the path of a checkpoint."""
        if choice.tier is not Tier.durable:
            assert self.memory is not None
            holder = choice.holders[self._rank]
            if holder != self._rank:
                assert self.peers is not None
                return self.peers.fetch(
                    choice.snapshot, layout, self.timelines.run, self.members[holder]
                ), None
            return self.memory.fault(choice.snapshot), None
        if self.checkpoint is None:
            return None, None
        try:
            self.checkpoint.verify()
        except InvalidCheckpoint as error:
            self._refuse(error)
            return str(error), None
        return None, str(self.checkpoint.path)

    def _settled(self, choice: Choice, path: str | None) -> Choice:
        if choice.tier is not Tier.durable:
            self.checkpoint = None
        elif self.checkpoint is None:
            assert path is not None
            self.checkpoint = open_checkpoint(Path(path), verify=False)
        return choice

    def _refuse(self, error: InvalidCheckpoint) -> None:
        warn_skipped(error.path, error.reason)
        self.alarms.append(("corrupt_checkpoint", f"skipped a damaged checkpoint: {error}"))
        self._faults.append(error)

    def _gather(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self._world_size
        dist.all_gather_object(found, mine, group=self._control)
        return found
