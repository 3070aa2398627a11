"""Where the ranks are, in one line that stays readable for any number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from parallel.exchange_check import ExchangeCheck, Spot, describe_places, describe_places_within

NOW = 1_000_000.0


@pytest.fixture(autouse=True)
def clock_that_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    still = SimpleNamespace(time=lambda: NOW, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr("parallel.exchange_check.time", still)


def store_of(spots: dict[int, Spot], ages: dict[int, float] | None = None) -> dist.Store:
    store = dist.HashStore()
    for rank, spot in spots.items():
        age = (ages or {}).get(rank, 0.0)
        store.set(f"place/{rank}", json.dumps([NOW - age, spot]))
    return store


def test_the_one_that_is_elsewhere_comes_first() -> None:
    there, here = Spot(7, "", 3, "combine"), Spot(7, "", 4, "dispatch")
    store = store_of({0: here, 1: there, 2: here, 3: here}, {1: 12.0, 3: 2.0})
    expected = (
        "rank 1 at step 7, layer 3, combine, 12 s ago; ranks 0, 2-3 at step 7, layer 4, dispatch, 0 s ago"
    )
    assert describe_places(store, 4) == expected


def test_of_two_places_the_older_comes_first() -> None:
    spots = {0: Spot(7, "micro-batch 2 of 3", None, "counts"), 1: Spot(8, "start")}
    early, late = "rank 0 at step 7, micro-batch 2 of 3, counts", "rank 1 at step 8, start"
    assert describe_places(store_of(spots, {0: 3.0, 1: 60.0}), 2) == f"{late}, 60 s ago; {early}, 3 s ago"
    assert describe_places(store_of(spots, {0: 60.0, 1: 3.0}), 2) == f"{early}, 60 s ago; {late}, 3 s ago"


def test_all_at_one_place_and_one_rank_alone() -> None:
    assert describe_places(store_of(dict.fromkeys(range(4), Spot(2, "optimizer"))), 4) == (
        "all 4 ranks at step 2, optimizer, 0 s ago"
    )
    assert describe_places(store_of({0: Spot(0, "start")}), 1) == "rank 0 at step 0, start, 0 s ago"


def test_a_rank_that_never_said_anything_is_told_apart() -> None:
    store = store_of({0: Spot(1), 3: Spot(1)}, {0: 5.0, 3: 5.0})
    assert describe_places(store, 5) == "ranks 0, 3 at step 1, 5 s ago; ranks 1-2, 4 not heard of yet"


def test_nobody_said_anything() -> None:
    assert describe_places(dist.HashStore(), 4) == ""


def test_thousands_of_ranks_stay_one_line() -> None:
    world = 4096
    behind = {rank: Spot(7, "", 2, "combine") for rank in range(0, world, 2)}
    ahead = {rank: Spot(7, "", 3, "dispatch") for rank in range(1, world, 2)}
    spots = {**behind, **ahead, 9: Spot(6, "optimizer"), 700: Spot(6, "optimizer")}
    assert describe_places(store_of(spots), world) == (
        "ranks 9, 700 at step 6, optimizer, 0 s ago; 2,047 ranks at step 7, layer 2, combine, 0 s ago; "
        "2,047 ranks at step 7, layer 3, dispatch, 0 s ago"
    )
    scattered = store_of({**{rank: Spot(rank) for rank in range(world)}, 7: Spot(8), 9: Spot(8)})
    line = describe_places(scattered, world)
    assert line.startswith("rank 0 at step 0, ")
    assert "; 4,088 ranks at 4,088 other places; ranks 7-9 at step 8, 0 s ago" in line
    assert len(line) < 300


def test_a_check_leaves_its_newest_place() -> None:
    store = dist.HashStore()
    check = ExchangeCheck(store, rank=5, ranks=[5], world_size=6, timeout_seconds=1.0)
    assert "rank 5 at step 0, start, 0 s ago" in describe_places(store, 6)
    check.enter("micro-batch 1 of 2", 8)
    check.enter("evaluation, batch 1 of 4")
    assert "rank 5 at step 8, evaluation, batch 1 of 4, 0 s ago" in describe_places(store, 6)


HOST = """
import sys, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def test_a_store_that_is_stuck_or_gone_is_no_second_error() -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert host.stdout is not None
        client = dist.TCPStore("127.0.0.1", int(host.stdout.readline()), is_master=False)
        client.set("place/0", json.dumps([NOW, Spot(3)]))
        assert describe_places_within(client, 1, seconds=60.0) == "rank 0 at step 3, 0 s ago"
        host.send_signal(signal.SIGSTOP)
        os.waitpid(host.pid, os.WUNTRACED)  # a signal is sent before it is delivered
        assert describe_places_within(client, 1, seconds=0.5) == ""
    finally:
        host.kill()
        host.communicate()
    with pytest.raises(RuntimeError):
        describe_places(client, 1)
    assert describe_places_within(client, 1, seconds=60.0) == ""
