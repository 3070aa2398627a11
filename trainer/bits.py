"""Counter-based randomness and hashing: every value is a function of (key, global index), of nothing else.

A layout decides which elements of a tensor a rank holds; the numbers here only look at where an element
stands in the whole tensor. So weights drawn and digests taken slice by slice agree, bit for bit, with
those of one process, under any layout. Integers are torch int64 that wrap around, read as 64-bit words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def signed(word: int) -> int:
    """The 64-bit word ``word`` (any int, taken mod 2^64) as the int64 with the same bits."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def name_key(name: str, seed: int = 0) -> int:
    """A 64-bit key of a name: ``xxh3_64(name, seed)``."""
    return xxhash.xxh3_64_intdigest(name.encode(), seed & _WORD)


def chunk_elements(device: torch.device) -> int:
    """Elements worked on at a time: a CPU core's cache, or enough to fill an accelerator (≤ 16 Mi)."""
    return 1 << 16 if device.type == "cpu" else 1 << 24


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    # ``>>`` on int64 copies the sign bit down; the mask drops the copies.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's output for state ``x`` (Steele et al., OOPSLA 2014): a bijection of 64-bit words.

    Args:
        x: int64, any shape, left as it is.

    Returns:
        int64 of the same shape, each bit of which depends on all bits of its input.
    """
    if x.device.type == "cpu":
        # Unsigned words are multiplied in vectors, in half of torch's time.
        words = np.array(x.numpy()).view(np.uint64)
        scratch = np.empty_like(words)
        words += np.uint64(_GOLDEN)
        for bits, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
            words ^= np.right_shift(words, np.uint64(bits), out=scratch)
            words *= np.uint64(multiplier)
        words ^= np.right_shift(words, np.uint64(31), out=scratch)
        return torch.from_numpy(words.view(np.int64))
    x = x + signed(_GOLDEN)
    x.bitwise_xor_(_logical_shift(x, 30)).mul_(signed(_MULTIPLIERS[0]))
    x.bitwise_xor_(_logical_shift(x, 27)).mul_(signed(_MULTIPLIERS[1]))
    return x.bitwise_xor_(_logical_shift(x, 31))


def mix64_int(x: int) -> int:
    """:func:`mix64` of one word given as an int in [0, 2^64)."""
    x = (x + _GOLDEN) & _WORD
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _WORD
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _WORD
    return x ^ (x >> 31)


def global_indices(
    global_shape: Sequence[int],
    offsets: Sequence[int],
    local_shape: Sequence[int],
    device: torch.device,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Row-major flat indices in the whole tensor of a slice's elements ``start … stop − 1``.

    Args:
        global_shape: shape of the whole tensor.
        offsets: where the slice starts in each dim.
        local_shape: shape of the slice.
        device: where the indices are made.
        start, stop: a range of the slice's own row-major flat indices; ``stop=None``: to its end.

    Returns:
        int64 [stop − start].
    """
    stop = math.prod(local_shape) if stop is None else stop
    if stop <= start:
        return torch.empty(0, dtype=torch.int64, device=device)
    strides = [math.prod(global_shape[dim + 1 :]) for dim in range(len(global_shape))]
    # ``run``: how many of the slice's elements in a row are neighbours in the whole tensor too.
    run, outer = 1, len(local_shape)
    while outer > 0:
        outer -= 1
        run *= local_shape[outer]
        if local_shape[outer] != global_shape[outer]:
            break
    first, last = start // run, -(-stop // run)
    rows = torch.arange(first, last, device=device)
    base = torch.full_like(rows, sum(o * s for o, s in zip(offsets, strides, strict=True)))
    for dim in reversed(range(outer)):
        base += (rows % local_shape[dim]) * strides[dim]
        rows = rows // local_shape[dim]
    low, high = start - first * run, stop - first * run
    if last - first == 1:
        return base + torch.arange(low, high, device=device)
    return (base[:, None] + torch.arange(run, device=device)).reshape(-1)[low:high]


def flat_start(global_shape: Sequence[int], offsets: Sequence[int], local_shape: Sequence[int]) -> int | None:
    """Flat index in the whole tensor of a slice's first element, if all of them are neighbours there; else None."""
    found, stride, whole = 0, 1, True
    for size, offset, local in zip(global_shape[::-1], offsets[::-1], local_shape[::-1], strict=True):
        if not whole and local != 1:
            return None
        whole = whole and local == size
        found, stride = found + offset * stride, stride * size
    return found


def chunks(
    global_shape: Sequence[int], offsets: Sequence[int], local_shape: Sequence[int], device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Walk a slice in bounded pieces: its flat range, and the global indices [range] of it."""
    total, step = math.prod(local_shape), chunk_elements(device)
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield (
            slice(start, stop),
            global_indices(global_shape, offsets, local_shape, device, start, stop),
        )


def normal_(
    out: Tensor,
    key: int,
    global_shape: Sequence[int],
    offsets: Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Fill a slice of a tensor with normal samples that depend on (key, global index) only.

    The samples are exact to about 1e-15, |z| ≤ 8.6, and the same bits for any slicing, thread count or
    IEEE 754 device: beside integers only +, −, ×, ÷ and √ are used, which round in one way, whereas the
    logarithm and cosine of a library may differ in the last bit between a vector's body and its tail.

    Args:
        out: floating point, of the slice's shape; written in place. May be empty or not contiguous.
        key: any int; different keys give independent samples. See :func:`name_key`.
        global_shape: shape of the whole tensor.
        offsets: where the slice starts in it.
        mean, std: of the samples.

    Returns:
        ``out``.
    """
    with torch.no_grad():
        filled = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        flat = filled.view(-1)
        for part, indices in chunks(global_shape, offsets, out.shape, out.device):
            samples = _standard_normal(indices, key).mul_(std).add_(mean)
            # Through fp32, so that a narrower type is rounded by the same two steps everywhere.
            flat[part] = samples if out.dtype == torch.float64 else samples.float()
        if filled is not out:
            out.copy_(filled)
    return out


def _standard_normal(indices: Tensor, key: int) -> Tensor:
    """Box–Muller (1958) over two words hashed from (key, index): float64 of the indices' shape."""
    first = mix64_int(key & _WORD)
    # Two rounds, each with a key of its own: after one, two keys would give one stream, permuted. The
    # complement keeps the second key from cancelling the first round (an index is never negative).
    second = mix64_int(first ^ _WORD)
    state = mix64(indices ^ signed(first)).bitwise_xor_(signed(second))
    radius_bits, angle_bits = mix64(state), mix64(state.add_(signed(_GOLDEN)))
    uniform = _logical_shift(radius_bits, 11).add_(1).to(torch.float64).mul_(2.0**-53)  # (0, 1]
    radius = _log(uniform).mul_(-2.0).sqrt_()
    # The cosine of a quarter turn with a random sign is distributed as that of a whole one.
    quarter = (angle_bits & ((1 << 52) - 1)).to(torch.float64).mul_(2.0**-52 * math.pi / 2)
    return _cos_quarter(quarter).mul_(torch.where(angle_bits < 0, -radius, radius))


def _log(u: Tensor) -> Tensor:
    """ln u for u in (0, 1], float64, to 1e-15, by exact arithmetic: e·ln 2 + 2·artanh((m − 1)/(m + 1))."""
    mantissa, exponent = torch.frexp(u)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    exponent = exponent.to(torch.float64) - low.to(torch.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)  # |s| ≤ 0.1716: eleven odd terms reach 1e-17
    square = s * s
    series = torch.full_like(s, 1.0 / 21)
    for odd in range(19, 0, -2):
        series.mul_(square).add_(1.0 / odd)
    return series.mul_(s).mul_(2.0).add_(exponent.mul_(math.log(2.0)))


def _cos_quarter(x: Tensor) -> Tensor:
    """cos x for x in [0, π/2], float64, to 1e-16: its Taylor series up to x^22."""
    square = x * x
    series = torch.full_like(x, -1.0 / math.factorial(22))
    for power in range(20, -1, -2):
        series.mul_(square).add_((-1.0) ** (power // 2) / math.factorial(power))
    return series
