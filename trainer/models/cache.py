"""What attention keeps of the tokens it has seen, so that a new token costs one position instead of all.

Shape suffixes: B rows, S new positions, L positions kept, H heads, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of one layer: takes the two tensors that attention keeps of the new positions, ``[B, H, S, C]`` each, and
gives those of all positions so far, ``[B, H, L, C]``."""


class KvCache:
    """Two tensors a layer and position: keys and values, or the latent and the rotary key of MLA.

    Rows may be of different lengths: each has places of its own, so padding stands on the right of a call's
    tokens, is seen by nobody, and is overwritten by the row's next tokens. The memory is allocated once.

    Args:
        num_layers: attention layers.
        num_rows: B.
        size: positions that a row can hold.
        num_heads: of what is kept (1 for MLA).
        widths: C of the first and of the second tensor.
        table: cos and sin of the rotary embedding, ``[size, C]`` each.
        dtype: of activations.

    Attributes:
        lengths: tokens of each row so far, those of the call that is being made included.
        table: cos and sin for the positions of this call, ``[B, 1, S, C]``.
        mask: ``[B, 1, S, L]``, True where a new position may look: at itself and what is before it.
        last_B: which of this call's positions is the last real one of each row, int64.
    """

    table: tuple[Tensor, Tensor]
    mask: Tensor
    last_B: Tensor

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        size: int,
        num_heads: int,
        widths: tuple[int, int],
        table: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.size = size
        self.lengths = [0] * num_rows
        self._whole_table = table
        device = table[0].device
        # Zeros, not empty: a place that is masked away must not hold a NaN.
        self._kept = [
            tuple(torch.zeros(num_rows, size, num_heads, c, dtype=dtype, device=device) for c in widths)
            for _ in range(num_layers)
        ]

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self._whole_table[0].device

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return sum(kept.numel() * kept.element_size() for pair in self._kept for kept in pair)

    def next(self, num_new: Sequence[int]) -> Self:
        """Make room for a call with this many real tokens in each row (at least one; the widest sets S)."""
        assert min(num_new) > 0 and len(num_new) == len(self.lengths)
        width, before = max(num_new), self.lengths
        self.lengths = [old + new for old, new in zip(before, num_new, strict=True)]
        end = max(before) + width
        assert end <= self.size, f"{end} positions of {self.size}"
        host = torch.tensor([before, [new - 1 for new in num_new]])
        start_B, self.last_B = host.to(self.device, non_blocking=True)
        self._position_BS = start_B[:, None] + torch.arange(width, device=self.device)
        self._row_B1 = torch.arange(len(before), device=self.device)[:, None]
        cos, sin = (part[self._position_BS][:, None] for part in self._whole_table)
        self.table = cos, sin
        places = torch.arange(end, device=self.device)
        self.mask = (places <= self._position_BS[:, :, None])[:, None]
        return self

    def layer(self, index: int) -> Remember:
        """What layer ``index`` calls with its new positions."""

        def remember(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            kept = self._kept[index]
            for held, new in zip(kept, (first, second), strict=True):
                held[self._row_B1, self._position_BS] = new.transpose(1, 2).to(held.dtype)
            end = self.mask.shape[-1]
            all_first, all_second = (held[:, :end].transpose(1, 2) for held in kept)
            return all_first, all_second

        return remember

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order."""
        index = torch.tensor(rows, device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        self._kept = [tuple(held[index] for held in pair) for pair in self._kept]
