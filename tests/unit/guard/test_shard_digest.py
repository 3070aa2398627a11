"""Digests of state at rest: every bit counts, in its turn, on any path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn

from parallel.engines.base import Engine, StateSlice
from trainer.guard import digest
from trainer.guard.digest import ShardDigests, digests, pieces_of, state_at_rest


class Held:
    """An engine's state: a weight of three pieces, a buffer, an optimizer slot and an empty shard."""

    def __init__(self) -> None:
        self.model = nn.Module()
        self.model.register_buffer("seen", torch.zeros(3))
        size = 2 * (1 << 18) + 5
        chance = torch.Generator().manual_seed(0)
        self.weight = torch.randn(size, generator=chance)
        self.slot = torch.randn(7, 3, generator=chance)
        self.seen = self.model.get_buffer("seen")

    def named_state(self) -> Iterator[StateSlice]:
        for name, tensor in (
            ("model.weight", self.weight),
            ("model.seen", self.seen),
            ("optim.exp_avg.weight", self.slot),
            ("model.empty", torch.empty(0)),
        ):
            yield StateSlice(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, owner=True)


@pytest.fixture
def held() -> Any:
    return Held()


def flip(tensor: torch.Tensor, byte: int, bit: int) -> None:
    tensor.view(-1).view(torch.uint8)[byte] ^= 1 << bit


def test_any_bit_of_weights_and_slots_is_seen_and_named(held: Any) -> None:
    watch = ShardDigests(cast(Engine, held), 1)
    assert watch.changed() is None, "nothing was taken yet"
    last = held.weight.numel() * 4 - 1
    for tensor, name, byte in (
        (held.weight, "model.weight", 0),
        (held.weight, "model.weight", last),
        (held.slot, "optim.exp_avg.weight", 11),
    ):
        for bit in (0, 7):
            watch.take(1)
            assert not watch.changed()
            flip(tensor, byte, bit)
            assert watch.changed()
            assert watch.changed_names() == [name]


def test_who_may_write_does_and_a_flip_before_that_is_not_forgotten(held: Any) -> None:
    watch = ShardDigests(cast(Engine, held), 1)
    watch.take(1)
    watch.settle()
    held.weight.mul_(2)
    watch.take(1)
    assert not watch.changed()
    flip(held.slot, 3, 1)
    watch.settle()
    held.weight.mul_(2)
    watch.take(1)
    assert watch.changed() and watch.changed_names() == ["optim.exp_avg.weight"]
    watch.forget()
    watch.take(1)
    assert not watch.changed()


def test_buffers_are_the_models_own_business(held: Any) -> None:
    watch = ShardDigests(cast(Engine, held), 1)
    watch.take(0)
    held.seen.add_(1)
    assert not watch.changed()


def test_parts_in_turn_cover_everything_once(held: Any) -> None:
    pieces = pieces_of(state_at_rest(cast(Engine, held)))
    assert [piece.name for piece in pieces] == ["model.weight"] * 3 + ["optim.exp_avg.weight"]
    assert sum(len(piece.data) for piece in pieces) == 4 * (held.weight.numel() + held.slot.numel())
    watch = ShardDigests(cast(Engine, held), 3)
    seen = 0
    for step in range(3):
        watch.take(step)
        flip(held.weight, (1 << 20) + 9, 3)  # in the second piece
        seen += bool(watch.changed())
    assert seen == 1


@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_the_sum_that_devices_take_sees_every_flip(start: int) -> None:
    chance = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (8 * 50 + 3 + start,), dtype=torch.uint8, generator=chance)[start:]
    before = int(digest._weighted_sum(data))
    for byte in range(0, len(data), 7):
        for bit in range(8):
            data[byte] ^= 1 << bit
            assert int(digest._weighted_sum(data)) != before
            data[byte] ^= 1 << bit
    swapped = torch.cat((data[8:16], data[:8], data[16:]))
    assert int(digest._weighted_sum(swapped)) != before


def test_no_pieces_have_no_digest() -> None:
    assert digests([]).numel() == 0
