"""A rank that works slowly is named, not those that wait for it; replacing it changes no bit."""

from __future__ import annotations

from typing import Any

from tests.chaos.test_kill import callback
from tests.command import EP2, Workplace
from tests.commands.watch import assert_nothing_left

WATCHED = [*EP2, "train.steps=26", "checkpoint.every=10", "resilience.straggler_seconds=2"]


def sleep(*ranks: int, folder: str = "") -> str:
    return f"callbacks=[{callback('SleepAtWork', ranks=list(ranks), seconds=0.4, folder=folder)}]"


def alarms(workplace: Workplace, run: str) -> list[dict[str, Any]]:
    events = workplace.events("alarm", workplace.path / "runs" / "e2e" / run)
    return [alarm for alarm in events if alarm["kind"] == "straggler"]


def test_the_slow_one_of_two_ranks_is_named_and_replaced(workplace: Workplace) -> None:
    workplace.train(*WATCHED, sleep(0, 1), "run.id=alike")
    assert alarms(workplace, "alike") == [], "ranks that are slow alike"

    workplace.train(*WATCHED, sleep(1), "run.id=named")
    found = alarms(workplace, "named")
    assert {alarm["rank"] for alarm in found} == {1}
    assert "times as long as the median rank over 5 steps" in found[0]["message"]
    assert "rank 0" in found[0]["evidence"] and "rank 1" in found[0]["evidence"]
    named = workplace.path / "runs" / "e2e" / "named"
    assert all(alarm["began"] < alarm["time"] for alarm in found)
    assert workplace.events("failure", named) == [], "it goes on"
    ratios = [r.get("perf/rank_work_max_over_median", 1.0) for r in workplace.records("metrics.jsonl", named)]
    assert max(ratios) > 2

    once = sleep(1, folder=str(workplace.path / "marks"))
    workplace.train(*WATCHED, once, "resilience.straggler_action=replace")
    (failure,) = workplace.events("failure")
    assert (failure["kind"], failure["rank"]) == ("straggler", 1)
    assert failure["began"] < failure["time"] and "rank 0 on" in failure["evidence"]
    assert len(workplace.events("restart")) == 1
    assert alarms(workplace, "a") == [], "its replacement is as fast as its peer"
    digests = {workplace.digest(workplace.path / "runs" / "e2e" / run) for run in ("alike", "named", "a")}
    assert len(digests) == 1
    assert_nothing_left(workplace)
