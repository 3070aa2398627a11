"""Ranks that hold the same state must hold the same bits: who does not, and in which tensors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import xxhash

from parallel.engines.base import Engine, StateSlice
from trainer.guard.digest import digests, pieces_of, state_at_rest


@dataclass(frozen=True)
class Odd:
    """Replicas that differ.

    Attributes:
        ranks: in the minority; all of the group where there is none (two replicas, or an equal split).
        names: tensors in which they differ from the others.
        held: digest of each rank of the group, to tell after the fact who was right.
        number: of the kind of tensors: 0 whole ones, 1 parts.
    """

    number: int
    ranks: tuple[int, ...]
    names: tuple[str, ...]
    held: Mapping[int, int]

    @property
    def known(self) -> bool:
        """Whether a majority says who is wrong."""
        return len(self.ranks) < len(self.held)


class Replicas:
    """Compares this rank's state with that of the ranks that hold the same.

    Whole tensors and parts of tensors are compared apart: under data parallelism with expert parallelism all ranks
    hold the same dense tensors, and some of them the same experts.

    Args:
        engine: prepared, its state in place.
        control: a gloo group over all ranks.
    """

    def __init__(self, engine: Engine, control: dist.ProcessGroup) -> None:
        self.control = control
        parts = state_at_rest(engine)
        whole = [part for part in parts if tuple(part.tensor.shape) == tuple(part.global_shape)]
        cut = [part for part in parts if tuple(part.tensor.shape) != tuple(part.global_shape)]
        self._kinds = [whole, cut]
        self._groups: list[tuple[int, list[int]]] = []
        """Number of the kind, and the ranks of which each holds the same; equal on all ranks."""
        places = self._gather([_place(kind) for kind in self._kinds])
        for number in range(len(self._kinds)):
            by_place: dict[int, list[int]] = defaultdict(list)
            for rank, theirs in enumerate(places):
                by_place[theirs[number]].append(rank)
            self._groups += [(number, ranks) for place, ranks in by_place.items() if place and len(ranks) > 1]

    @property
    def exist(self) -> bool:
        """Whether any rank holds what another one holds; the same on every rank."""
        return bool(self._groups)

    def held(self) -> list[list[int]]:
        """Digests that each rank holds, by kind. Collective."""
        return self._gather([_digest(kind) for kind in self._kinds])

    def compare(self) -> list[Odd]:
        """The groups whose members differ; the same on every rank. Collective."""
        held = self.held()
        differing = [
            (number, ranks)
            for number, ranks in self._groups
            if len({held[rank][number] for rank in ranks}) > 1
        ]
        if not differing:
            return []
        by_name = self._gather([_by_name(kind) for kind in self._kinds])
        return [
            odd_one(
                number,
                {rank: held[rank][number] for rank in ranks},
                {rank: by_name[rank][number] for rank in ranks},
            )
            for number, ranks in differing
        ]

    def _gather(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(found, mine, group=self.control)
        return found


def odd_one(number: int, held: Mapping[int, int], by_name: Mapping[int, Mapping[str, int]]) -> Odd:
    """Who differs from the majority of a group.

    Args:
        number: of the kind of tensors.
        held: digest of all that each rank holds.
        by_name: the same of each tensor.
    """
    (value, votes), *_ = Counter(held.values()).most_common(1)
    wrong = tuple(rank for rank in held if held[rank] != value) if 2 * votes > len(held) else tuple(held)
    names = next(iter(by_name.values())).keys()
    differing = tuple(name for name in names if len({theirs[name] for theirs in by_name.values()}) > 1)
    return Odd(number, wrong, differing, dict(held))


def _place(parts: Sequence[StateSlice]) -> int:
    """Of what stands where, values aside; 0 of nothing."""
    if not parts:
        return 0
    text = repr([(part.name, part.offsets, tuple(part.tensor.shape)) for part in parts])
    return xxhash.xxh3_64_intdigest(text.encode()) or 1


def _digest(parts: Sequence[StateSlice]) -> int:
    return xxhash.xxh3_64_intdigest(digests(pieces_of(parts)).cpu().numpy().tobytes())


def _by_name(parts: Sequence[StateSlice]) -> dict[str, int]:
    return {part.name: _digest([part]) for part in parts}
