"""Who is a straggler: made-up times of ranks, and what a clock of waits sees."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from trainer.straggler import Judge, Notice, Reading, WaitClock


def follow(
    seconds: Callable[[int, int], float], windows: int, ranks: int = 4, load: float = 1.0
) -> list[Notice]:
    """What is said of ranks that work ``seconds(rank, window)``; a window takes 10 s, rank 1 has the load."""
    judge, said = Judge(2.0, 0.0), []
    for window in range(1, windows + 1):
        told = {
            rank: Reading(window, 20, f"host-{rank}", seconds(rank, window), load if rank == 1 else 1.0)
            for rank in range(ranks)
        }
        said += judge.look(told, 10.0 * window)
    return said


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_slow_rank_is_named_once_its_third_window_is_slow(ranks: int) -> None:
    said = follow(lambda rank, window: 0.39 if rank == 1 and window > 2 else 0.13, 5, ranks)
    (notice,) = said
    assert (notice.rank, notice.host, notice.slow) == (1, "host-1", True)
    assert notice.began == 20.0, "the end of the last window in which it was not slow"
    assert "rank 1 on host-1 works 3.0 times as long as the median rank over 20 steps" in notice.message
    assert "0.39 s a step beside 0.13 s" in notice.message
    assert notice.evidence.splitlines()[0].startswith("rank 1 on host-1: works 0.39 s")
    assert len(notice.evidence.splitlines()) == ranks


def test_noise_warm_up_and_spikes_name_nobody() -> None:
    chance = random.Random(0)
    assert follow(lambda rank, window: 0.1 * chance.uniform(0.75, 1.45), 500) == []
    assert follow(lambda rank, window: 9.0 if window <= 5 else 0.1, 20) == [], "all compile"
    assert follow(lambda rank, window: 1.0 if rank == 1 and window % 3 else 0.1, 30) == [], "two of three"
    assert follow(lambda rank, window: 1.0 if rank == window % 4 else 0.1, 30) == [], "another one each time"


def test_it_is_told_again_ever_more_rarely_and_when_it_is_over() -> None:
    said = follow(lambda rank, window: 0.5 if rank == 1 and window <= 30 else 0.1, 40)
    *still, over = said
    assert all(notice.slow for notice in still) and not over.slow
    assert "no longer slow: it works 1.0 times" in over.message
    assert 3 <= len(still) <= 6
    assert still[0].began == 0.0 and over.began < 330.0
    slow_again = follow(lambda rank, window: 0.5 if rank == 1 and (window <= 5 or window > 10) else 0.1, 15)
    assert [notice.slow for notice in slow_again] == [True, False, True]
    assert slow_again[2].began == 100.0


def test_what_is_told_has_no_gap_and_no_overlap() -> None:
    judge, said = Judge(2.0, 0.0), []
    for window in range(1, 30):
        told = {rank: Reading(window, 20, "h", 0.5 if rank else 0.1, 1.0) for rank in range(2)}
        found = judge.look(told, 10.0 * window)
        said += [(notice.began, 10.0 * window) for notice in found]
    said += [(notice.began, 300.0) for notice in judge.still_slow(told, 300.0)]
    assert said[0][0] == 0.0 and said[-1][1] == 300.0
    assert all(until == began for (_, until), (began, _) in pairwise(said))


def test_experts_that_get_more_tokens_may_take_longer() -> None:
    assert follow(lambda rank, window: 0.35 if rank == 1 else 0.13, 9, load=1.6) == []
    assert follow(lambda rank, window: 0.65 if rank == 1 else 0.13, 9, load=1.6)[0].rank == 1


def test_two_slow_ranks_of_many_are_both_named() -> None:
    said = follow(lambda rank, window: 0.4 if rank in (2, 5) else 0.1, 3, ranks=8)
    assert sorted(notice.rank for notice in said) == [2, 5]


def test_the_clock_sees_what_its_own_thread_waits() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    original = dist.Work.wait
    try:
        clock = WaitClock()
        with clock.running():
            dist.all_reduce(torch.ones(1))
            mine = clock.seconds
            assert mine > 0
            time.sleep(0.05)
            assert clock.seconds == mine, "work is no wait"
            other = threading.Thread(target=lambda: dist.all_reduce(torch.ones(1)))
            other.start()
            other.join()
            assert clock.seconds == mine
        dist.all_reduce(torch.ones(1))
        assert clock.seconds == mine
        assert dist.Work.wait is original
    finally:
        dist.destroy_process_group()
