"""The same micro-batch on two ranks must give the same loss: who computes wrong shows against a neighbour.

::

    rank r:  forward(own batch) = a_r      forward(batch of r - 1) = b_r        compare a_r with b_{r+1}
    differ:  both are computed again, and a third rank computes batch r: c_{r+2}

A rank whose own value changes when it is computed again is the odd one; else the third opinion decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.data.batch import Batch

Forward = Callable[[Batch], float]


@dataclass(frozen=True)
class Opinion:
    """What data-parallel rank r found, for its own batch and for those of the ranks before it.

    Attributes:
        losses: of the batches of r, r - 1 and (a third opinion) r - 2.
    """

    losses: tuple[float, ...]


@dataclass(frozen=True)
class Suspect:
    """Who computed a batch otherwise. ``ranks`` has two where nothing decides between them."""

    ranks: tuple[int, ...]
    what: str


class Replay:
    """Re-executes micro-batches on the next data-parallel rank.

    Args:
        peers: global ranks in data-parallel order, each of which has a batch of its own.
        me: place of this rank among them.
        control: a gloo group over all ranks.
        forward: loss of a batch on this rank, without gradients. Collective.
        tolerance: relative; 0: to the bit. Not 0 where rows of several ranks meet in one matrix product, whose
            rounding depends on their order.
    """

    def __init__(
        self,
        peers: Sequence[int],
        me: int,
        control: dist.ProcessGroup,
        forward: Forward,
        tolerance: float,
    ) -> None:
        self.peers, self.me, self.control = list(peers), me, control
        self.forward, self.tolerance = forward, tolerance

    def check(self, batch: Batch) -> Suspect | None:
        """Replay one micro-batch of every rank; None: all agree. The same on every rank. Collective."""
        theirs = self._pass_on(batch)
        first = self._opinions([batch, theirs])
        if not disagreements(first, self.tolerance):
            return None
        third = self._pass_on(theirs)
        again = self._opinions([batch, theirs, third])
        return judge(first, again, self.tolerance)

    def _opinions(self, batches: Sequence[Batch]) -> list[Opinion]:
        mine = torch.tensor([self.forward(batch) for batch in batches], dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.control))]
        dist.all_gather(found, mine, group=self.control)
        return [Opinion(tuple(found[rank].tolist())) for rank in self.peers]

    def _pass_on(self, batch: Batch) -> Batch:
        """Give a batch to the next rank and take that of the one before. Batches arrive on the CPU."""
        after = self.peers[(self.me + 1) % len(self.peers)]
        before = self.peers[(self.me - 1) % len(self.peers)]
        received = {}
        for name, tensor in vars(batch).items():
            target = torch.empty_like(tensor)
            pending = [
                dist.isend(tensor.contiguous(), after, group=self.control),
                dist.irecv(target, before, group=self.control),
            ]
            for work in pending:
                assert work is not None
                work.wait()
            received[name] = target
        return Batch(**received)


def differ(a: float, b: float, tolerance: float) -> bool:
    """Whether two losses of one batch are not the same; NaN is the same as NaN only."""
    if a != a or b != b:
        return (a != a) != (b != b)
    return abs(a - b) > tolerance * max(abs(a), abs(b))


def disagreements(opinions: Sequence[Opinion], tolerance: float) -> list[int]:
    """Batches (by the rank that they belong to) of which the next rank found another loss."""
    num = len(opinions)
    return [
        r for r in range(num) if differ(opinions[r].losses[0], opinions[(r + 1) % num].losses[1], tolerance)
    ]


def judge(first: Sequence[Opinion], again: Sequence[Opinion], tolerance: float) -> Suspect:
    """Who is to blame for a disagreement in ``first``, given a second round with third opinions."""
    num = len(first)
    unsteady = tuple(
        r
        for r in range(num)
        if any(differ(a, b, tolerance) for a, b in zip(first[r].losses, again[r].losses[:2], strict=True))
    )
    if unsteady:
        return Suspect(unsteady, "computed the same batch twice with different losses")
    blamed: set[int] = set()
    undecided: set[int] = set()
    for r in disagreements(again, tolerance):
        own, theirs = again[r].losses[0], again[(r + 1) % num].losses[1]
        third = again[(r + 2) % num].losses[2]
        if num > 2 and not differ(own, third, tolerance):
            blamed.add((r + 1) % num)
        elif num > 2 and not differ(theirs, third, tolerance):
            blamed.add(r)
        else:
            undecided |= {r, (r + 1) % num}
    if blamed:
        return Suspect(tuple(sorted(blamed)), "found another loss for a batch than two other ranks did")
    return Suspect(tuple(sorted(undecided)), "found different losses for the same batch")
