"""A digest of the weights that does not depend on the layout and needs no gathering.

Two sums over all elements, each modulo 2^64, in which every element has a factor of its own:

    i = 65536 · block + place        lane l = Σ (bits + 1) · F_l[place] · (mix64(key(name) ^ block) | 1)

with F_0[p] = mix64(p) | 1 and F_1[p] = mix64(F_0[p]) | 1, and bits read as a signed number (multilinear hashing:
Carter and Wegman, 1979). All factors are odd, so one changed element always changes both lanes; for several the
factors would have to conspire. A sum commutes, so ranks add up what they own and the parts add up to what one
process would have found. Two products an element and no more: a save behind training computes this on processors
that training would like to have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer.bits import chunks, flat_start, mix64, mix64_int, name_key, signed

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
            sums.append(_sums_of_run(words.numpy(), start, key))
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
    """F_0 and F_1 of the definition, int64 [65536]."""
    first = mix64(torch.arange(_PLACES, device=device)) | 1
    return first, mix64(first) | 1


def _sums(indices: Tensor, bits: Tensor, key: int) -> Tensor:
    """Both lanes ``[2]`` of elements anywhere, int64."""
    place = indices & (_PLACES - 1)
    # Not in place: of a 64-bit tensor the bits are its own memory.
    products = (bits + 1) * (mix64((indices >> 16) ^ signed(key)) | 1)
    return torch.stack([(products * table[place]).sum() for table in _tables(bits.device)])


def _sums_of_run(words: NDArray[Any], start: int, key: int) -> Tensor:
    """The same of neighbours, the first at global index ``start``, on a CPU: in pieces that stay in its cache."""
    tables = [table.numpy() for table in _tables(torch.device("cpu"))]
    bits, scratch = np.empty((2, min(_PLACES, words.size)), np.int64)
    lanes, begin = [0] * _LANES, 0
    while begin < words.size:
        block, low = divmod(start + begin, _PLACES)
        size = min(_PLACES - low, words.size - begin)
        np.add(words[begin : begin + size], 1, out=bits[:size], dtype=np.int64)
        factor = mix64_int(key ^ block) | 1
        for lane, table in enumerate(tables):
            product = np.multiply(bits[:size], table[low : low + size], out=scratch[:size])
            lanes[lane] += int(product.sum()) * factor
        begin += size
    return torch.tensor([signed(lane) for lane in lanes])
