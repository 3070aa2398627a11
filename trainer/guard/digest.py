"""Digests of what a rank holds at rest: whether a bit of its weights or optimizer changed by itself.

Between two optimizer steps nobody writes weights or optimizer state, but for cures and hooks whose time is known.
Their digest is taken right after the update (and again after such a writer), and compared right before the next
update, so a forward and backward pass on spoilt weights never commits. Every byte each time is dear: each step
looks at a part of them, the parts in turn. A flip is seen if it is in the part of its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from parallel.engines.base import Engine, StateSlice
from trainer.bits import signed

_PIECE_BYTES = 1 << 20
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


@dataclass(frozen=True)
class Piece:
    """A stretch of this rank's part of a tensor, as bytes."""

    name: str
    data: Tensor


def state_at_rest(engine: Engine) -> list[StateSlice]:
    """Weights and optimizer slots; not buffers, which a model may write as it runs.

    The engines keep them in one place for the life of the process.
    """
    buffers = {f"model.{name}" for name, _ in engine.model.named_buffers()}
    return [part for part in engine.named_state() if part.name not in buffers and part.tensor.numel()]


def pieces_of(parts: Sequence[StateSlice]) -> list[Piece]:
    """Cut into stretches of 1 MiB, so that any n-th of them is about an n-th of the bytes."""
    found = []
    for part in parts:
        data = part.tensor.view(-1).view(torch.uint8)
        found += [Piece(part.name, data[at : at + _PIECE_BYTES]) for at in range(0, len(data), _PIECE_BYTES)]
    return found


def digests(pieces: Sequence[Piece]) -> Tensor:
    """One int64 a piece, on the device where the pieces are; no host sync.

    On CPU xxh3. On a device a sum of weighted words, which one flipped bit always changes and several at random
    miss with odds of 2^-64.
    """
    if not pieces:
        return torch.zeros(0, dtype=torch.int64)
    if pieces[0].data.device.type == "cpu":
        values = [signed(xxhash.xxh3_64_intdigest(piece.data.numpy().data)) for piece in pieces]
        return torch.tensor(values, dtype=torch.int64)
    return torch.stack([_weighted_sum(piece.data) for piece in pieces])


def _weighted_sum(data: Tensor) -> Tensor:
    # A stretch of a flat buffer may begin at any element.
    width, words_of = next((size, kind) for size, kind in _WORDS if data.storage_offset() % size == 0)
    whole = len(data) // width * width
    words = data[:whole].view(words_of)
    # Odd weights are units mod 2^64: no change of a single word gives the same sum.
    weights = torch.arange(1, 2 * len(words), 2, dtype=torch.int64, device=data.device)
    return (words * weights).sum() + data[whole:].long().sum()


class ShardDigests:
    """Watches one rank's state at rest.

    Args:
        engine: prepared, its state in place.
        every: each step looks at one of this many parts; 1: at everything.
    """

    def __init__(self, engine: Engine, every: int) -> None:
        self.every = every
        found = pieces_of(state_at_rest(engine))
        # What is on another device than the rest (step counts) is a few bytes.
        self._pieces = [piece for piece in found if piece.data.device == found[0].data.device]
        self._sample: list[Piece] = []
        self._taken: Tensor | None = None
        self._before: tuple[Tensor, list[str]] | None = None

    def take(self, step: int) -> None:
        """Remember this step's part as it is now: ``step`` steps are done and nobody will write."""
        self._sample = self._pieces[step % self.every :: self.every]
        self._taken = digests(self._sample)

    def settle(self) -> None:
        """Somebody will write, as he may: keep what :meth:`changed` says until now; then :meth:`take` again."""
        changed = self.changed()
        if changed is not None:
            self._before = changed, self.changed_names() if changed.device.type == "cpu" and changed else []

    def changed(self) -> Tensor | None:
        """Whether anything is something else now, 0-dim bool, no host sync; None: nothing was taken."""
        if self._taken is None:
            return None
        changed = (digests(self._sample) != self._taken).any()
        return changed if self._before is None else changed | self._before[0]

    def changed_names(self) -> list[str]:
        """Of the tensors in which it is (a host sync)."""
        assert self._taken is not None
        different = (digests(self._sample) != self._taken).tolist()
        names = {piece.name for piece, is_so in zip(self._sample, different, strict=True) if is_so}
        return sorted(names.union([] if self._before is None else self._before[1]))

    def forget(self) -> None:
        """All of the state was written: what was found before says nothing any more."""
        self._taken = self._before = None
