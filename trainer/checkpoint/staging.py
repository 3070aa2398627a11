"""The only part of a save that training waits for: copying what this rank owns to host memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer.checkpoint.format import Blob, Chunk, TensorEntry, shard_name
from trainer.checkpoint.pages import PAGE, empty_pages, register, unregister
from trainer.checkpoint.shards import DTYPE_NAMES, ShardImage, lay_out

WEIGHTS_PREFIX = "model."
"""Names of the weights and persistent buffers, which the digest covers."""


class HostMemory:
    """Host memory that is kept from save to save: warm pages take a copy at twice the speed of new ones.

    Costs one copy of the rank's state (page-locked for tensors of an accelerator).
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._registered = False

    def take(self, size: int, for_gpu: bool) -> Tensor:
        """uint8 of at least ``size`` bytes, from the beginning of a page. What was taken before is void."""
        kept = self._memory
        if kept is None or not size <= kept.numel() <= 2 * size + PAGE or for_gpu != self._registered:
            if kept is not None and self._registered:
                unregister(kept)
            self._memory = kept = None  # before there are two
            self._memory = kept = empty_pages(size)
            self._registered = for_gpu
            if for_gpu:
                register(kept)
        return kept


@dataclass(frozen=True)
class Staged:
    """What a rank contributes to one checkpoint, independent of the training state from now on.

    Attributes:
        image: its shard file.
        weights: the owned slices of weights and persistent buffers, in the image.
        entries: every tensor that the rank knows, with the chunks that it owns.
        blobs: its own tensors by name.
    """

    image: ShardImage
    weights: list[StateSlice]
    entries: dict[str, TensorEntry]
    blobs: dict[str, Blob]


def stage(
    rank: int, slices: Iterable[StateSlice], rank_tensors: dict[str, Tensor], memory: HostMemory
) -> Staged:
    """Copy this rank's owned, non-empty slices and its own tensors to where they stand in its shard file."""
    file = shard_name(rank)
    entries: dict[str, TensorEntry] = {}
    owned: dict[str, StateSlice] = {}
    for part in slices:
        assert not part.name.startswith("rank."), f"{part.name}: names in 'rank.' are the ranks' own tensors"
        entry = TensorEntry(DTYPE_NAMES[part.tensor.dtype], tuple(part.global_shape), ())
        known = entries.setdefault(part.name, entry)
        assert (known.dtype, known.global_shape) == (entry.dtype, entry.global_shape), part.name
        if not part.owner or part.tensor.numel() == 0:
            continue
        count = len(known.chunks)
        key = part.name if count == 0 else f"{part.name}#{count}"
        chunk = Chunk(file, key, tuple(part.offsets), tuple(part.tensor.shape))
        entries[part.name] = replace(known, chunks=(*known.chunks, chunk))
        owned[key] = part
    blobs = {
        name: Blob(file, f"rank.{rank}.{name}", DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in rank_tensors.items()
    }
    sources = {key: part.tensor.detach() for key, part in owned.items()}
    sources |= {blob.key: rank_tensors[name] for name, blob in blobs.items()}
    on_gpu = any(source.is_cuda for source in sources.values())
    image = lay_out(list(sources.items()), lambda size: memory.take(size, on_gpu))
    for key, source in sources.items():
        image.tensors[key].copy_(source, non_blocking=True)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    weights = [
        replace(part, tensor=image.tensors[key])
        for key, part in owned.items()
        if part.name.startswith(WEIGHTS_PREFIX)
    ]
    return Staged(image, weights, entries, blobs)
