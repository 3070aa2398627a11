"""Rows of sharded tensors copied, zeroed and rescaled in place, whatever rank holds which part of them.

A row is one index of a tensor's first dim: an expert in a stack, an expert's line of a router. Everything goes
through :class:`parallel.engines.base.StateSlice`, so it is the same for every engine and layout, and no tensor
is ever put together: a value travels from a rank that has it to the ranks that need it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engines.base import StateSlice

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and shape."""


@dataclass(frozen=True)
class RowCopy:
    """Row ``source_row`` of one tensor over row ``target_row`` of another (or the same)."""

    source: str
    source_row: int
    target: str
    target_row: int


@dataclass(frozen=True)
class _Meta:
    """What other ranks know of a slice."""

    index: int
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    owner: bool

    def row_box(self, row: int) -> Box | None:
        """The part of a row that is here, in the coordinates of a row; None: nothing."""
        if not self.offsets[0] <= row < self.offsets[0] + self.shape[0] or 0 in self.shape:
            return None
        return self.offsets[1:], self.shape[1:]


@dataclass(frozen=True)
class _Transfer:
    """A box of a row that goes from one rank's slice to another's (or its own)."""

    copy: RowCopy
    box: Box
    source_rank: int
    source_slice: int
    target_rank: int
    target_slice: int


@torch.no_grad()
def copy_rows(slices: Sequence[StateSlice], copies: Sequence[RowCopy], control: dist.ProcessGroup) -> None:
    """Copy rows between tensors, bit for bit, into every slice that holds a target, replicas too.

    All sources are read before any target is written. Each rank that needs a value gets it from the nearest
    rank that has all of it (with ep, the neighbour on the ep axis that holds the same part of an expert), or
    from its owners piece by piece. Collective: every rank of the world calls it with the same copies.

    Args:
        slices: of ``Engine.named_state``, at least those of the tensors named.
        copies: source and target row have one shape and dtype.
        control: a group over all ranks that carries small facts.
    """
    names = {name for copy in copies for name in (copy.source, copy.target)}
    mine = [
        _Meta(index, part.name, part.offsets, tuple(part.tensor.shape), part.owner)
        for index, part in enumerate(slices)
        if part.name in names
    ]
    held: list[list[_Meta]] = [[] for _ in range(dist.get_world_size(control))]
    dist.all_gather_object(held, mine, group=control)
    rank = dist.get_rank(control)
    transfers = [transfer for copy in copies for transfer in _plan(copy, held)]
    arrived = _exchange(slices, transfers, rank)
    for transfer, values in arrived:
        _region(slices[transfer.target_slice], transfer.copy.target_row, transfer.box).copy_(values)


def _plan(copy: RowCopy, held: list[list[_Meta]]) -> Iterator[_Transfer]:
    """Every transfer of a copy, in an order that all ranks agree on."""
    for target_rank, metas in enumerate(held):
        for meta in metas:
            box = meta.row_box(copy.target_row) if meta.name == copy.target else None
            if box is not None:
                for source_rank, source_slice, part in _sources(copy, box, target_rank, held):
                    yield _Transfer(copy, part, source_rank, source_slice, target_rank, meta.index)


def _sources(
    copy: RowCopy, wanted: Box, target_rank: int, held: list[list[_Meta]]
) -> list[tuple[int, int, Box]]:
    """Where the values of a box come from: one slice that holds it all, else its owners."""
    for rank in sorted(range(len(held)), key=lambda other: (abs(other - target_rank), other)):
        for meta, box in _rows(held[rank], copy):
            if _intersect(box, wanted) == wanted:
                return [(rank, meta.index, wanted)]
    found = []
    for rank, metas in enumerate(held):
        for meta, box in _rows(metas, copy):
            common = _intersect(box, wanted) if meta.owner else None
            if common is not None:
                found.append((rank, meta.index, common))
    covered = sum(math.prod(shape) for *_, (_, shape) in found)
    assert covered == math.prod(wanted[1]), f"{copy.source}: row {copy.source_row} is not owned in full"
    return found


def _rows(metas: list[_Meta], copy: RowCopy) -> Iterator[tuple[_Meta, Box]]:
    for meta in metas:
        box = meta.row_box(copy.source_row) if meta.name == copy.source else None
        if box is not None:
            yield meta, box


def _intersect(a: Box, b: Box) -> Box | None:
    start = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    stop = [min(x + m, y + n) for x, m, y, n in zip(*a, *b, strict=True)]
    shape = tuple(e - s for s, e in zip(start, stop, strict=True))
    return None if any(size <= 0 for size in shape) else (start, shape)


def _region(part: StateSlice, row: int, box: Box) -> Tensor:
    """The values of a box of a row (a view)."""
    values = part.tensor.select(0, row - part.offsets[0])
    for dim, (start, size) in enumerate(zip(*box, strict=True)):
        values = values.narrow(dim, start - part.offsets[dim + 1], size)
    return values


def _exchange(
    slices: Sequence[StateSlice], transfers: list[_Transfer], rank: int
) -> list[tuple[_Transfer, Tensor]]:
    """This rank's incoming values; what goes from one rank to another is one message a dtype."""
    outgoing: dict[tuple[int, Any], list[Tensor]] = defaultdict(list)
    incoming: dict[tuple[int, Any], list[_Transfer]] = defaultdict(list)
    arrived: list[tuple[_Transfer, Tensor]] = []
    for transfer in transfers:
        if transfer.source_rank == rank:
            part = slices[transfer.source_slice]
            values = _region(part, transfer.copy.source_row, transfer.box)
            if transfer.target_rank == rank:
                arrived.append((transfer, values.clone()))
            else:
                outgoing[transfer.target_rank, values.dtype].append(values.reshape(-1))
        elif transfer.target_rank == rank:
            dtype = slices[transfer.target_slice].tensor.dtype
            incoming[transfer.source_rank, dtype].append(transfer)
    operations, buffers = [], {}
    for (peer, _), parts in sorted(outgoing.items(), key=_peer_and_type):
        operations.append(dist.P2POp(dist.isend, torch.cat(parts), peer))
    for (peer, dtype), expected in sorted(incoming.items(), key=_peer_and_type):
        size = sum(math.prod(transfer.box[1]) for transfer in expected)
        device = slices[expected[0].target_slice].tensor.device
        buffers[peer, dtype] = torch.empty(size, dtype=dtype, device=device)
        operations.append(dist.P2POp(dist.irecv, buffers[peer, dtype], peer))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for key, expected in incoming.items():
        sizes = [math.prod(transfer.box[1]) for transfer in expected]
        for transfer, values in zip(expected, buffers[key].split(sizes), strict=True):
            arrived.append((transfer, values.view(transfer.box[1])))
    return arrived


def _peer_and_type(item: tuple[tuple[int, Any], Any]) -> tuple[int, str]:
    (peer, dtype), _ = item
    return peer, str(dtype)


def rows_here(slices: Sequence[StateSlice], name: str, row: int) -> Iterator[tuple[StateSlice, Tensor]]:
    """Each slice of a tensor that holds some of a row, and that part as a view ``[1, …]``."""
    for part in slices:
        if part.name == name and part.tensor.numel():
            local = row - part.offsets[0]
            if 0 <= local < part.tensor.shape[0]:
                yield part, part.tensor.narrow(0, local, 1)
