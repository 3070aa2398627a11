"""Which tensor on disk is which part of which tensor of Muster's, and in what arrangement.

Muster stacks the experts of a layer in one tensor per matrix, inputs first; published checkpoints have one
file entry an expert and matrix, outputs first. A *piece* is one such entry, whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """A rearrangement of values between disk and Muster; it loses nothing. This one leaves all as it is."""

    said: str = "as is"

    def to_muster(self, stored: Tensor) -> Tensor:
        """The box of Muster's tensor from what is on disk."""
        return stored

    def to_hf(self, box: Tensor) -> Tensor:
        """The inverse of :meth:`to_muster`."""
        return box

    def hf_shape(self, box: Shape) -> Shape:
        """The shape on disk of a box of this shape."""
        return box


@dataclass(frozen=True)
class Transposed(Change):
    """One expert's matrix: ``[out, in]`` on disk, ``[1, in, out]`` in the stack."""

    said: str = "transposed into the stack of experts"

    def to_muster(self, stored: Tensor) -> Tensor:
        return stored.t()[None]

    def to_hf(self, box: Tensor) -> Tensor:
        return box[0].t()

    def hf_shape(self, box: Shape) -> Shape:
        return box[2], box[1]


@dataclass(frozen=True)
class RotaryPairs(Change):
    """Rows that the rotary embedding turns: neighbours on disk, halves in Muster.

    DeepSeek turns features (0, 1), (2, 3), …; Muster turns (0, n), (1, n + 1), …. With the rows that make the
    features reordered the dot products of queries and keys are the same.

    Attributes:
        heads: equal blocks of rows.
        before: rows of a block that are not turned, which come first.
        rope: rows that are.
    """

    said: str = "rotary pairs to halves"
    heads: int = 1
    before: int = 0
    rope: int = 2

    def to_muster(self, stored: Tensor) -> Tensor:
        return self._turned(stored, (self.rope // 2, 2))

    def to_hf(self, box: Tensor) -> Tensor:
        return self._turned(box, (2, self.rope // 2))

    def _turned(self, weight: Tensor, grid: tuple[int, int]) -> Tensor:
        blocks = weight.unflatten(0, (self.heads, self.before + self.rope)).clone()
        turned = blocks[:, self.before :].unflatten(1, grid).transpose(1, 2).flatten(1, 2)
        blocks[:, self.before :] = turned
        return blocks.flatten(0, 1)


AS_IS = Change()
TRANSPOSED = Transposed()


@dataclass(frozen=True)
class Place:
    """Where on disk: a whole entry, or one expert of a fused one (``half``: 0 its gate, 1 its up matrix)."""

    name: str
    expert: int | None = None
    half: int | None = None

    @property
    def part(self) -> str | None:
        """Which part of the entry, for people; None: all of it."""
        if self.expert is None:
            return None
        return f"expert {self.expert}" + ("" if self.half is None else (", gate", ", up")[self.half])


@dataclass(frozen=True)
class Piece:
    """One tensor of the published form and the box of Muster's tensor that it is.

    Attributes:
        hf: its place in the published form.
        fused: where it is in the form that transformers holds in memory, and can be made to save.
        muster: name of Muster's tensor, without ``model.``.
        offsets, shape: of the box.
        change: how the values are rearranged.
    """

    hf: Place
    fused: Place
    muster: str
    offsets: Shape
    shape: Shape
    change: Change

    @property
    def hf_shape(self) -> Shape:
        """Of the entry on disk."""
        return self.change.hf_shape(self.shape)


def whole_piece(hf: str, fused: str, muster: str, shape: Shape, change: Change) -> Piece:
    """A tensor that is one entry on disk."""
    return Piece(Place(hf), Place(fused), muster, (0,) * len(shape), shape, change)


def expert_pieces(hf: str, folder: str, leaf: str, muster: str, shape: Shape) -> Iterable[Piece]:
    """The experts of one stack.

    Args:
        hf: name of an expert's entry, ``{}`` for its index.
        folder: where the fused entries are: ``model.layers.0.mlp.experts``.
        leaf: w1 (gate), w2 (down) or w3 (up).
        shape: of the stack.
    """
    fused, half = (
        (f"{folder}.down_proj", None) if leaf == "w2" else (f"{folder}.gate_up_proj", int(leaf == "w3"))
    )
    for expert in range(shape[0]):
        offsets, box = (expert, 0, 0), (1, *shape[1:])
        place = Place(fused, expert, half)
        yield Piece(Place(hf.format(expert)), place, muster, offsets, box, TRANSPOSED)
