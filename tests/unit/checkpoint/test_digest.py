"""The weights digest: the same for any layout, another for any other bits."""

from __future__ import annotations

import random

import pytest
import torch
from checkpoint_helpers import one_process, random_layout, sample_state, slice_of
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer import bits
from trainer.bits import mix64_int, name_key
from trainer.checkpoint.digest import DIGEST, combine, weights_digest


def digest_of(tensor: Tensor, name: str = "model.w") -> str:
    return combine(
        [weights_digest([slice_of(name, tensor, (tuple(0 for _ in tensor.shape), tuple(tensor.shape)))])]
    )


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_digest_does_not_depend_on_the_layout(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = sample_state()
    whole = combine([weights_digest(one_process(state)[0])])
    assert DIGEST.fullmatch(whole)
    monkeypatch.setattr(bits, "chunk_elements", lambda device: 17)
    for seed in range(5):
        layout = random_layout(state, world_size, random.Random(seed))
        parts = [weights_digest(slices) for slices in layout]
        assert combine(parts) == combine(reversed(parts)) == whole


def test_digest_is_the_documented_sum() -> None:
    tensor = torch.randn(3, 50_000)  # three blocks of places
    tensor[0, :4] = torch.tensor([1.5, -2.0, 0.0, -0.0])
    key, lanes = name_key("model.w"), [0, 0]
    for index, word in enumerate(tensor.reshape(-1).view(torch.int32).tolist()):
        first = mix64_int(index % 65536) | 1
        of_block = mix64_int(key ^ index // 65536) | 1
        lanes[0] += (word + 1) * first * of_block
        lanes[1] += (word + 1) * (mix64_int(first) | 1) * of_block
    assert digest_of(tensor) == f"{lanes[1] % 2**64:016x}{lanes[0] % 2**64:016x}"


def test_elements_that_are_no_neighbours_are_the_same_sum() -> None:
    tensor = torch.randn(7, 30, 1000)
    whole = digest_of(tensor)
    columns = [(0, 11), (11, 400), (400, 1000)]
    parts = [
        weights_digest([slice_of("model.w", tensor, ((0, 0, low), (7, 30, high - low)))])
        for low, high in columns
    ]
    assert combine(parts) == whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float32, torch.bfloat16])
def test_looking_changes_nothing(dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 10).mul(100).to(dtype)
    before = tensor.clone()
    digest_of(tensor)
    # A column of its own: its elements are no neighbours in the whole tensor.
    weights_digest([StateSlice("model.w", (6, 40), (0, 10), tensor, True)])
    assert torch.equal(tensor, before)


def test_every_bit_of_every_tensor_matters() -> None:
    state = sample_state()
    seen = {combine([weights_digest(one_process(state)[0])])}
    rng = random.Random(1)
    changes = 0
    for tensor in state.values():
        raw = tensor.reshape(-1).view(torch.uint8)
        for _ in range(min(5, raw.numel())):
            at, bit = rng.randrange(raw.numel()), 1 << rng.randrange(8)
            if tensor.dtype == torch.bool:
                bit = 1  # other values of a bool's byte are not defined
            raw[at] ^= bit
            seen.add(combine([weights_digest(one_process(state)[0])]))
            raw[at] ^= bit
            changes += 1
    # A flip may be drawn twice, but no two different flips may meet.
    assert changes - 3 <= len(seen) - 1 <= changes


def test_digest_is_over_bits_places_and_names() -> None:
    assert digest_of(torch.tensor([0.0])) != digest_of(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert digest_of(nans[:1]) != digest_of(nans[1:])
    assert digest_of(torch.tensor([1.0, 2.0])) != digest_of(torch.tensor([2.0, 1.0]))
    assert digest_of(torch.ones(3), "model.a") != digest_of(torch.ones(3), "model.b")
    assert digest_of(torch.zeros(3)) != digest_of(torch.zeros(4))


def test_only_owned_elements_count() -> None:
    tensor = torch.randn(4, 4)
    owned = StateSlice("model.w", (4, 4), (0, 0), tensor, True)
    replica = StateSlice("model.w", (4, 4), (0, 0), tensor, False)
    transposed = StateSlice("model.w", (4, 4), (0, 0), tensor.t().contiguous().t(), True)
    assert weights_digest([owned, replica]) == weights_digest([owned]) == weights_digest([transposed])
    assert weights_digest([replica]) == 0
    assert combine([]) == "0" * 32
