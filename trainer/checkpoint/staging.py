"""The only part of a save that training waits for: copying what this rank owns to host memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer.checkpoint.format import Blob, Chunk, TensorEntry, shard_name
from trainer.checkpoint.shards import DTYPE_NAMES

WEIGHTS_PREFIX = "model."
"""Names of the weights and persistent buffers, which the digest covers."""


class HostBuffers:
    """Host memory that is kept from save to save: warm pages take a copy at twice the speed of new ones.

    Costs one copy of the rank's state in host memory (page-locked for tensors of an accelerator).
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._used: dict[str, Tensor] = {}
        self._asynchronous = False

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """A contiguous host copy, complete after :meth:`finish`."""
        buffer = self._kept.pop(key, None)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffer.copy_(tensor.detach(), non_blocking=True)
        self._asynchronous |= tensor.is_cuda
        self._used[key] = buffer
        return buffer

    def finish(self) -> None:
        """Wait for the copies and let go of buffers that this save did not need."""
        if self._asynchronous:
            torch.cuda.current_stream().synchronize()
        self._kept, self._used, self._asynchronous = self._used, {}, False


@dataclass(frozen=True)
class Staged:
    """What a rank contributes to one checkpoint, independent of the training state from now on.

    Attributes:
        tensors: (key, host tensor) of its shard file.
        weights: the owned slices of weights and persistent buffers, on the host.
        entries: every tensor that the rank knows, with the chunks that it owns.
        blobs: its own tensors by name.
    """

    tensors: list[tuple[str, Tensor]]
    weights: list[StateSlice]
    entries: dict[str, TensorEntry]
    blobs: dict[str, Blob]

    @property
    def bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors)


def stage(
    rank: int, slices: Iterable[StateSlice], rank_tensors: dict[str, Tensor], buffers: HostBuffers
) -> Staged:
    """Copy this rank's owned, non-empty slices and its own tensors to host memory."""
    file = shard_name(rank)
    staged = Staged([], [], {}, {})
    for part in slices:
        assert not part.name.startswith("rank."), f"{part.name}: names in 'rank.' are the ranks' own tensors"
        entry = TensorEntry(DTYPE_NAMES[part.tensor.dtype], tuple(part.global_shape), ())
        known = staged.entries.setdefault(part.name, entry)
        assert (known.dtype, known.global_shape) == (entry.dtype, entry.global_shape), part.name
        if not part.owner or part.tensor.numel() == 0:
            continue
        count = len(known.chunks)
        key = part.name if count == 0 else f"{part.name}#{count}"
        host = buffers.copy(key, part.tensor)
        chunk = Chunk(file, key, tuple(part.offsets), tuple(host.shape))
        staged.entries[part.name] = replace(known, chunks=(*known.chunks, chunk))
        staged.tensors.append((key, host))
        if part.name.startswith(WEIGHTS_PREFIX):
            staged.weights.append(replace(part, tensor=host))
    for name, tensor in rank_tensors.items():
        key = f"rank.{rank}.{name}"
        staged.tensors.append((key, buffers.copy(key, tensor)))
        staged.blobs[name] = Blob(file, key, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
    buffers.finish()
    return staged
