"""A digest of the weights that does not depend on the layout and needs no gathering.

Each element gives a word hashed from (name, global flat index, bits); the digest is the sum of all words, in two
lanes of 64 bits. A sum commutes, so ranks add up what they own and the parts add up to what one process would have
found:

    i = 65536 · block + place        z = mix64(A[place] ^ mix64(key(name) ^ block) ^ bits)
    lane 0 = Σ z mod 2^64            lane 1 = Σ z · M[place] mod 2^64

with A[p] = mix64(p) and odd M[p] = mix64(A[p]) | 1. Where an element stands is looked up, not hashed anew: a save
behind training computes this on processors that training would like to have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer.bits import chunks, flat_start, mix64, mix64_int, mix64_words_, name_key, signed

_LANES = 2
_WORD = (1 << 64) - 1
_PLACES = 1 << 16
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
    found: dict[torch.device, list[Tensor]] = {}
    for part in slices:
        if not part.owner or part.tensor.numel() == 0:
            continue
        flat = part.tensor.detach().reshape(-1)
        words, key = flat.view(_BITS[flat.element_size()]), name_key(part.name)
        start = flat_start(part.global_shape, part.offsets, part.tensor.shape)
        sums = found.setdefault(flat.device, [])
        if start is not None and flat.device.type == "cpu":
            sums += _sums_of_run(words.numpy(), start, key)
            continue
        for where, indices in chunks(part.global_shape, part.offsets, part.tensor.shape, flat.device):
            sums.append(_sums(indices, words[where].to(torch.int64), key))
    lanes = [0] * _LANES
    for sums in found.values():
        for lane, total in enumerate(torch.stack(sums).sum(0).tolist()):
            lanes[lane] += total
    return (lanes[0] & _WORD) | (lanes[1] & _WORD) << 64


def combine(parts: Iterable[int]) -> str:
    """The digest of the whole state, 32 hex digits, from every rank's part in any order."""
    lanes = [0] * _LANES
    for part in parts:
        for lane in range(_LANES):
            lanes[lane] = (lanes[lane] + (part >> 64 * lane)) & _WORD
    return f"{lanes[1]:016x}{lanes[0]:016x}"


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """A and M of the definition, int64."""
    hashed = mix64(torch.arange(_PLACES, device=device))
    return hashed, mix64(hashed) | 1


def _sums(indices: Tensor, bits: Tensor, key: int) -> Tensor:
    """Both lanes ``[2]`` of elements anywhere, int64."""
    hashed, factor = _tables(indices.device)
    place = indices & (_PLACES - 1)
    z = mix64(mix64((indices >> 16) ^ signed(key)).bitwise_xor_(hashed[place]).bitwise_xor_(bits))
    return torch.stack([z.sum(), z.mul_(factor[place]).sum()])


def _sums_of_run(words: NDArray[Any], start: int, key: int) -> Iterator[Tensor]:
    """The same of neighbours, the first at global index ``start``, on a CPU: in pieces that stay in its cache."""
    hashed, factor = _tables_of_words()
    kept = np.empty((2, min(_PLACES, words.size)), np.uint64)
    begin = 0
    while begin < words.size:
        block, low = divmod(start + begin, _PLACES)
        high = min(_PLACES, low + words.size - begin)
        z, scratch = kept[:, : high - low]
        # Through int64, as on any device: the sign of a negative word fills the upper half.
        z.view(np.int64)[:] = words[begin : begin + high - low]
        z ^= np.bitwise_xor(hashed[low:high], np.uint64(mix64_int(key ^ block)), out=scratch)
        first = mix64_words_(z, scratch).sum()
        z *= factor[low:high]
        yield torch.from_numpy(np.array([first, z.sum()]).view(np.int64))
        begin += high - low


@cache
def _tables_of_words() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    hashed, factor = _tables(torch.device("cpu"))
    return hashed.numpy().view(np.uint64), factor.numpy().view(np.uint64)
