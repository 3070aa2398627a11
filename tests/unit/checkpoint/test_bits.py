"""Counter-based bits: known values, independence of the slicing, and the quality of the samples."""

from __future__ import annotations

import math
import random

import pytest
import torch
from checkpoint_helpers import random_boxes, same_bits

from trainer import bits
from trainer.bits import global_indices, mix64, mix64_int, name_key, normal_

CPU = torch.device("cpu")


def test_mix64_is_splitmix64() -> None:
    # The first outputs of the published generator for seed 0: states 0, γ, 2γ.
    golden = 0x9E3779B97F4A7C15
    want = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = torch.tensor([bits.signed(i * golden) for i in range(3)])
    before = states.clone()
    assert [int(v) & (2**64 - 1) for v in mix64(states)] == want
    assert torch.equal(states, before)
    assert [mix64_int(i * golden % 2**64) for i in range(3)] == want


def test_mix64_changes_half_of_the_bits_for_any_input_bit() -> None:
    x = mix64(torch.arange(500))
    for bit in range(64):
        flipped = mix64(x) ^ mix64(x ^ bits.signed(1 << bit))
        changed = sum(int(v & (2**64 - 1)).bit_count() for v in flipped.tolist()) / len(x)
        assert 30 < changed < 34, bit


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (3, 4, 5), (2, 3, 2, 3), (5, 1, 4)])
def test_global_indices_of_any_slice_and_range(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    rng = random.Random(len(shape))
    for _ in range(20):
        for offsets, size in random_boxes(shape, rng):
            region = tuple(slice(o, o + s) for o, s in zip(offsets, size, strict=True))
            want = whole[region].reshape(-1)
            assert torch.equal(global_indices(shape, offsets, size, CPU), want)
            start = rng.randint(0, len(want))
            stop = rng.randint(start, len(want))
            assert torch.equal(global_indices(shape, offsets, size, CPU, start, stop), want[start:stop])


def test_global_indices_beyond_32_bits() -> None:
    shape = (1 << 20, 1 << 20)
    got = global_indices(shape, ((1 << 20) - 1, 5), (1, 2), CPU)
    assert got.tolist() == [(1 << 40) - (1 << 20) + 5, (1 << 40) - (1 << 20) + 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normal_does_not_depend_on_slicing_or_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (9, 11, 13)
    whole = normal_(torch.empty(shape, dtype=dtype), 42, shape, (0, 0, 0), mean=0.1, std=0.02)
    rng = random.Random(0)
    for elements in (1 << 16, 64, 7):
        monkeypatch.setattr(bits, "chunk_elements", lambda device, n=elements: n)
        for offsets, size in random_boxes(shape, rng, cuts=8):
            region = tuple(slice(o, o + s) for o, s in zip(offsets, size, strict=True))
            part = torch.full(size, math.nan, dtype=dtype)
            assert normal_(part, 42, shape, offsets, mean=0.1, std=0.02) is part
            assert same_bits(part, whole[region])
            transposed = torch.full(size[::-1], math.nan, dtype=dtype).permute(2, 1, 0)
            normal_(transposed, 42, shape, offsets, mean=0.1, std=0.02)
            assert same_bits(transposed, whole[region])
    monkeypatch.undo()
    threads = torch.get_num_threads()
    large = [torch.empty(100_003) for _ in range(2)]
    try:
        for tensor, count in zip(large, (1, 2), strict=True):
            torch.set_num_threads(count)
            normal_(tensor, 7, tensor.shape, (0,))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(large[0], large[1])


def test_normal_samples_are_normal() -> None:
    n = 1 << 18
    z = normal_(torch.empty(n, dtype=torch.float64), name_key("model.tok", 3), (n,), (0,))
    assert z.isfinite().all()
    # Each moment within five standard errors.
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    cdf = torch.special.ndtr(z.sort().values)
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps).abs(), (cdf - steps - 1 / n).abs()).max()
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov–Smirnov at 0.1 %
    assert z.unique().numel() == n
    assert 4 < z.abs().max() < 7


def test_normal_keys_and_neighbours_are_uncorrelated() -> None:
    n = 1 << 14
    samples = [
        normal_(torch.empty(n, dtype=torch.float64), key, (n,), (0,)) for key in (0, 1, 2, -1, 1 << 63)
    ]
    for i, a in enumerate(samples):
        assert abs((a[1:] * a[:-1]).mean()) < 5 / math.sqrt(n)
        for b in samples[i + 1 :]:
            assert abs((a * b).mean()) < 5 / math.sqrt(n)
            assert not torch.isin(a, b).any()  # nor one a permutation of the other


def test_normal_of_nothing_and_of_one() -> None:
    assert normal_(torch.empty(0, 3), 1, (4, 3), (2, 0)).numel() == 0
    scalar = normal_(torch.empty(()), 1, (), ())
    assert same_bits(scalar, normal_(torch.empty(1), 1, (1,), (0,))[0])
