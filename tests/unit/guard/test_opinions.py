"""Who is named when ranks disagree: about what they hold, and about what they compute."""

from __future__ import annotations

import math

import pytest

from trainer.guard.replay import Opinion, Suspect, differ, disagreements, judge
from trainer.guard.replicas import odd_one

RIGHT = [10.0, 11.0, 12.0, 13.0]
"""Loss of each rank's batch."""


def opinions(num: int, depth: int, wrong: dict[int, float]) -> list[Opinion]:
    """What ``num`` ranks find, of which some (rank → by how much) compute wrong."""
    return [
        Opinion(tuple(RIGHT[(r - back) % num] + wrong.get(r, 0.0) for back in range(depth)))
        for r in range(num)
    ]


@pytest.mark.parametrize("num", [2, 3, 4])
def test_ranks_that_agree_raise_no_suspicion(num: int) -> None:
    assert disagreements(opinions(num, 2, {}), 0.0) == []


@pytest.mark.parametrize("num", [3, 4])
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_rank_that_always_computes_wrong_is_named_by_third_opinions(num: int, culprit: int) -> None:
    first, again = (opinions(num, depth, {culprit: 1e-9}) for depth in (2, 3))
    assert len(disagreements(first, 0.0)) == 2, "of its own batch and of the one before"
    assert judge(first, again, 0.0).ranks == (culprit,)


@pytest.mark.parametrize("num", [2, 3, 4])
def test_a_rank_that_computed_wrong_once_is_named_by_its_own_second_try(num: int) -> None:
    first, again = opinions(num, 2, {1: 0.5}), opinions(num, 3, {})
    assert judge(first, again, 0.0).ranks == (1,)


def test_two_ranks_that_stand_by_what_they_said_are_both_named() -> None:
    first, again = opinions(2, 2, {1: 0.5}), opinions(2, 3, {1: 0.5})
    assert judge(first, again, 0.0) == Suspect((0, 1), "found different losses for the same batch")


def test_tolerance_is_relative_and_nan_differs_from_numbers_only() -> None:
    assert differ(1e6, 1e6 + 1, 0.0) and not differ(1e6, 1e6 + 1, 1e-5)
    assert differ(math.nan, 1.0, 1e-5) and not differ(math.nan, math.nan, 0.0)


def test_the_minority_of_replicas_is_named_with_its_tensors() -> None:
    names = {rank: {"w": 5, "b": 7 if rank == 2 else 6} for rank in (0, 2, 4)}
    odd = odd_one(0, {0: 1, 2: 9, 4: 1}, names)
    assert (odd.ranks, odd.names, odd.known) == ((2,), ("b",), True)


@pytest.mark.parametrize("held", [{0: 1, 3: 2}, {0: 1, 1: 1, 2: 2, 3: 2}, {0: 1, 1: 2, 2: 3}])
def test_without_a_majority_nobody_is_named_yet(held: dict[int, int]) -> None:
    odd = odd_one(1, held, {rank: {"w": value} for rank, value in held.items()})
    assert odd.ranks == tuple(held) and not odd.known
