"""A digest of the weights that does not depend on the layout and needs no gathering.

Each element gives a 128-bit word hashed from (name, global flat index, bits); the digest is the sum of
all words, lane by lane mod 2^64. A sum commutes, so ranks add up what they own and the parts add up to
what one process would have found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer.bits import chunks, mix64, name_key, signed

_LANES = 2
_WORD = (1 << 64) - 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

DIGEST = re.compile(r"[0-9a-f]{32}")
"""How a combined digest is written."""


def weights_digest(slices: Iterable[StateSlice]) -> int:
    """This rank's part of the digest: a 128-bit sum over the slices with ``owner=True``.

    The hash is over bits: −0.0 differs from 0.0, and two NaNs with other payloads differ. Works on the
    device where the tensors are, in pieces; waits for the device once at the end.

    Args:
        slices: weights and persistent buffers (names starting with ``model.``), of any dtype of 1 to 8
            bytes an element; other slices would be summed as well, so the caller leaves them out.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for part in slices:
        if not part.owner or part.tensor.numel() == 0:
            continue
        keys = [signed(name_key(part.name, lane)) for lane in range(_LANES)]
        flat = part.tensor.detach().reshape(-1)
        words = flat.view(_BITS[flat.element_size()])
        device = flat.device
        totals = sums.setdefault(
            device, [torch.zeros((), dtype=torch.int64, device=device) for _ in range(_LANES)]
        )
        for where, indices in chunks(part.global_shape, part.offsets, part.tensor.shape, device):
            bits = words[where].to(torch.int64)
            for lane, key in enumerate(keys):
                totals[lane] += mix64(mix64(indices ^ key).bitwise_xor_(bits)).sum()
    lanes = [sum(int(totals[lane].item()) for totals in sums.values()) & _WORD for lane in range(_LANES)]
    return lanes[0] | lanes[1] << 64


def combine(parts: Iterable[int]) -> str:
    """The digest of the whole state, 32 hex digits, from every rank's part in any order."""
    lanes = [0] * _LANES
    for part in parts:
        for lane in range(_LANES):
            lanes[lane] = (lanes[lane] + (part >> 64 * lane)) & _WORD
    return f"{lanes[1]:016x}{lanes[0]:016x}"
