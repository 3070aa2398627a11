"""The vote: the newest state that everyone has, of the run's own past; and the timelines behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.errors import ConfigError
from trainer.checkpoint.timeline import FILE, Timelines
from trainer.checkpoint.vote import Ballot, Choice, Snapshot, Tier, choose

ONE = Timelines("run", [0])


def ballot(
    *steps: int, durable: tuple[int, ...] = (), run: str = "run", held: dict[int, int] | None = None
) -> Ballot:
    copies = {rank: ((Snapshot(step, 0), "layout"),) for rank, step in (held or {}).items()}
    own = tuple(Snapshot(step, 0) for step in steps)
    return Ballot(run, "layout", own, copies, tuple(Snapshot(step, 0) for step in durable))


def test_the_newest_that_all_ranks_have() -> None:
    found = choose([ballot(3, 4, 5, durable=(3,)), ballot(4, 5, 6), ballot(2, 3, 4)], ONE)
    assert found == Choice(Snapshot(4, 0), Tier.memory, (0, 1, 2))


def test_a_newer_checkpoint_wins_and_at_most_is_kept() -> None:
    ballots = [ballot(3, 4, durable=(6,)), ballot(3, 4)]
    assert choose(ballots, ONE) == Choice(Snapshot(6, 0), Tier.durable)
    assert choose(ballots, ONE, at_most=3) == Choice(Snapshot(3, 0), Tier.memory, (0, 1))
    assert choose(ballots, ONE, at_most=2) is None


def test_a_copy_stands_in_for_a_lost_memory() -> None:
    ballots = [ballot(4, 5, held={1: 5}), ballot()]
    assert choose(ballots, ONE) == Choice(Snapshot(5, 0), Tier.peer, (0, 0))
    other = Ballot("run", "another layout")
    assert choose([ballots[0], other], ONE) is None, "what it holds does not fit that rank any more"


def test_another_runs_snapshots_do_not_count() -> None:
    assert choose([ballot(4), ballot(4, run="deleted")], ONE) is None


def test_a_future_that_was_given_up_does_not_come_back() -> None:
    after = Timelines("run", [0, 7])
    ballots = [ballot(6, 7, 8, durable=(9,)), ballot(6, 7, 8)]
    found = choose(ballots, after)
    assert found is not None and found.snapshot == Snapshot(7, 0)
    assert after.counts(8, 1) and not after.counts(8, 0)
    assert not after.counts(1, 2), "of a timeline that was never written down"
    assert after.counts(0, -1) and not after.counts(8, -1), "checkpoints that do not say"


def test_the_timelines_of_a_run_are_kept(tmp_path: Path) -> None:
    assert Timelines.read(tmp_path).starts == []
    first = Timelines()
    first.begin(0)
    first.begin(12)
    first.write(tmp_path)
    assert Timelines.read(tmp_path) == first and first.current == 1
    (tmp_path / FILE).write_text('{"run": "a", "starts": [0, "x"]}')
    with pytest.raises(ConfigError, match="which states count cannot be read"):
        Timelines.read(tmp_path)
