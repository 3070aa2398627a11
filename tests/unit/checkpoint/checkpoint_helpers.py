"""Whole states cut into arbitrary slices, and worlds of ranks (threads) that save and load them."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer.checkpoint.boxes import Box
from trainer.checkpoint.durable import DurableCheckpointer
from trainer.checkpoint.resume import Checkpoint

State = dict[str, Tensor]
Layout = list[list[StateSlice]]
"""The slices of each rank."""

_attempts = itertools.count()


def sample_state(seed: int = 0) -> State:
    """A small state with every kind of tensor: experts, vectors, counters, an empty one, all dtypes."""
    g = torch.Generator().manual_seed(seed)
    return {
        "model.layers.0.moe.experts.w1": torch.randn(8, 6, 5, generator=g),
        "model.layers.0.wq": torch.randn(7, 12, generator=g).bfloat16(),
        "model.norm": torch.randn(13, generator=g).half(),
        "model.router.bias": torch.randn(8, generator=g, dtype=torch.float64),
        "model.router.counts": torch.randint(0, 9, (8,), generator=g),
        "model.mask": torch.randint(0, 2, (3, 3), generator=g).bool(),
        "model.bytes": torch.randint(0, 255, (5,), generator=g, dtype=torch.uint8),
        "model.empty": torch.empty(0, 4),
        "optim.exp_avg.layers.0.moe.experts.w1": torch.randn(8, 6, 5, generator=g),
        "optim.step": torch.tensor(float(seed)),
        "optim.clock": torch.randint(0, 9, (4, 2), generator=g, dtype=torch.int32),
    }


def random_boxes(shape: Sequence[int], rng: random.Random, cuts: int = 4) -> list[Box]:
    """A partition of the shape by random cuts, not always a grid; some boxes are empty."""
    boxes: list[Box] = [(tuple(0 for _ in shape), tuple(shape))]
    for _ in range(cuts if shape else 0):
        offsets, size = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        at = rng.randint(0, size[dim])
        low = (offsets, (*size[:dim], at, *size[dim + 1 :]))
        start = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
        boxes += [low, (start, (*size[:dim], size[dim] - at, *size[dim + 1 :]))]
    return boxes


def slice_of(name: str, whole: Tensor, box: Box, owner: bool = True) -> StateSlice:
    offsets, shape = box
    region = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
    return StateSlice(name, tuple(whole.shape), offsets, whole[region].clone(), owner)


def random_layout(state: State, world_size: int, rng: random.Random) -> Layout:
    """Each tensor cut at random and dealt to random ranks; every rank also has a replica of one piece."""
    layout: Layout = [[] for _ in range(world_size)]
    for name, whole in state.items():
        boxes = random_boxes(whole.shape, rng)
        for box in boxes:
            layout[rng.randrange(world_size)].append(slice_of(name, whole, box))
        for rank in range(world_size):
            layout[rank].append(slice_of(name, whole, rng.choice(boxes), owner=False))
    return layout


def expert_layout(state: State, world_size: int, dim: int) -> Layout:
    """Tensors with experts split over ranks along ``dim``; the rest owned by rank 0, replicated elsewhere."""
    layout: Layout = [[] for _ in range(world_size)]
    for name, whole in state.items():
        zero = tuple(0 for _ in whole.shape)
        for rank in range(world_size):
            if "experts" not in name:
                layout[rank].append(slice_of(name, whole, (zero, tuple(whole.shape)), owner=rank == 0))
                continue
            edges = [round(whole.shape[dim] * r / world_size) for r in (rank, rank + 1)]
            offsets, shape = list(zero), list(whole.shape)
            offsets[dim], shape[dim] = edges[0], edges[1] - edges[0]
            layout[rank].append(slice_of(name, whole, (tuple(offsets), tuple(shape))))
    return layout


def one_process(state: State) -> Layout:
    return expert_layout(state, 1, 0)


def checkpointer(directory: Path, rank: int = 0, world_size: int = 1, **changes: Any) -> DurableCheckpointer:
    options: dict[str, Any] = {
        "attempt": "gen0",
        "keep_last": 2,
        "keep_every": 0,
        "timeout_seconds": 20.0,
    }
    return DurableCheckpointer(directory, rank, world_size, **{**options, **changes})


def save(
    directory: Path, step: int, layout: Layout, trainer: dict[str, Any] | None = None, **options: Any
) -> None:
    """Save from as many ranks as the layout has, each in a thread; raises the first rank's error."""
    options.setdefault("attempt", f"gen{next(_attempts)}")
    ranks = [checkpointer(directory, r, len(layout), **options) for r in range(len(layout))]

    def run(rank: int) -> None:
        blobs = {"rng": torch.tensor([step, rank], dtype=torch.uint8)}
        ranks[rank].save(step, layout[rank], trainer or {"step": step}, blobs, {"world": len(layout)})
        ranks[rank].wait()

    errors = in_threads([lambda r=r: run(r) for r in range(len(layout))])
    for error in errors:
        if error is not None:
            raise error


def in_threads(jobs: Sequence[Callable[[], None]]) -> list[Exception | None]:
    """Run the jobs at once; what each raised, or None."""
    errors: list[Exception | None] = [None] * len(jobs)

    def run(index: int) -> None:
        try:
            jobs[index]()
        except Exception as error:
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8)
    )


def load(checkpoint: Checkpoint, layout: Layout, state: State) -> None:
    """Load every rank of the layout into scratch tensors and assert that they hold the state's bits."""
    for slices in layout:
        scratch = [
            StateSlice(s.name, s.global_shape, s.offsets, torch.zeros_like(s.tensor), s.owner) for s in slices
        ]
        checkpoint.load_into(scratch)
        for part in scratch:
            region = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.tensor.shape, strict=True))
            assert same_bits(part.tensor, state[part.name][region]), part.name


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
