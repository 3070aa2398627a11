"""Which elements of which parameter this rank's DeepSpeed optimizer steps, and where they are.

    stage 0   whole parameters; every rank steps all of its own
    stage 1   the parameters of a group end to end in one flat buffer, cut into equal parts: a part may begin
    and 2     and end anywhere inside a parameter; the model's parameters are views of the whole buffer
    stage 3   each parameter cut by itself; a rank's parts end to end in one flat buffer

A part of a parameter is a range of its row-major elements, and a checkpoint knows boxes: :func:`boxes` turns
one into the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements ``start … stop − 1`` of a row-major tensor as boxes (offsets, shape), in order.

    At most ``2 · dims − 1`` of them, each of neighbouring elements; none for an empty range.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row, inner = math.prod(shape[1:]), tuple(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # inside one row
        for offsets, size in boxes(inner, start - last * row, stop - last * row):
            yield (last, *offsets), (1, *size)
        return
    for offsets, size in boxes(inner, start - (first - 1) * row, row) if first * row > start else ():
        yield (first - 1, *offsets), (1, *size)
    if last > first:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    for offsets, size in boxes(inner, 0, stop - last * row):
        yield (last, *offsets), (1, *size)


@dataclass(frozen=True)
class Shard:
    """The part of one local parameter that this rank's optimizer steps (empty where ``start == stop``).

    Attributes:
        start, stop: its range in the local parameter's row-major elements.
        flat: what the optimizer steps: the key of its state.
        group: number of ``flat`` among the optimizer's.
        position: where the range begins in ``flat``.
    """

    start: int
    stop: int
    flat: nn.Parameter
    group: int
    position: int

    def of(self, values: Tensor) -> Tensor:
        """The range's values (a view) in a tensor laid out like ``flat``."""
        return values.detach().view(-1)[self.position : self.position + self.stop - self.start]


def find_shards(stage: int, named: dict[str, nn.Parameter], optimizer: Any) -> dict[str, Shard]:
    """Every parameter's shard, once DeepSpeed has taken the model over.

    Also lets DeepSpeed's fp32 masters and the model's own fp32 parameters be one memory, which at stages 1 to
    3 are two of the same values: what is loaded into one is then in both, and a copy less is kept.

    Args:
        stage: of ZeRO.
        named: the model's parameters by canonical name.
        optimizer: ``DeepSpeedEngine.optimizer``.
    """
    if stage == 0:
        return {name: Shard(0, p.numel(), p, index, 0) for index, (name, p) in enumerate(named.items())}
    found = _flat_groups(optimizer) if stage < 3 else _partitioned(optimizer)
    return {name: found[parameter] for name, parameter in named.items()}


def _flat_groups(optimizer: Any) -> dict[nn.Parameter, Shard]:
    shards = {}
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        part = dist.get_rank(group=optimizer.real_dp_process_group[group])
        flat.data = optimizer.parallel_partitioned_bit16_groups[group][part].data
        low = part * flat.numel()
        parameters = optimizer.round_robin_bit16_groups[group]
        for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
            start = max(offset, low)
            stop = max(start, min(offset + parameter.numel(), low + flat.numel()))
            if start == stop:
                shards[parameter] = Shard(0, 0, flat, group, 0)
            else:
                shards[parameter] = Shard(start - offset, stop - offset, flat, group, start - low)
    return shards


def _partitioned(optimizer: Any) -> dict[nn.Parameter, Shard]:
    shards = {}
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        flat.data = optimizer.fp16_partitioned_groups_flat[group].data
        position = 0
        for parameter in optimizer.fp16_groups[group]:
            size, whole = parameter.partition_numel(), parameter.ds_numel
            start = min(whole, dist.get_rank(group=parameter.ds_process_group) * size)
            shards[parameter] = Shard(start, min(whole, start + size), flat, group, position)
            position += size
    return shards


def find_gradients(
    stage: int, named: dict[str, nn.Parameter], shards: dict[str, Shard], optimizer: Any
) -> dict[str, Tensor]:
    """The reduced gradients of this rank's shards, flat; writing into them changes the coming step.

    Only after the last backward of a step. A parameter without gradient at stage 0 is left out.
    """
    if stage == 0:
        return {n: p.grad.detach().view(-1) for n, p in named.items() if p.grad is not None}
    pieces: dict[tuple[int, int], Tensor] = {}
    for group, tensors in optimizer.averaged_gradients.items():
        position = 0
        for tensor in tensors:
            if tensor.numel():
                pieces[group, position] = tensor.detach().view(-1)
            position += tensor.numel()
    gradients = {}
    for name, shard in shards.items():
        size = shard.stop - shard.start
        piece = pieces[shard.group, shard.position] if size else torch.empty(0, device=shard.flat.device)
        gradients[name] = piece[:size]
    return gradients
