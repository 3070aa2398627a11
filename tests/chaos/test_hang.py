"""Ranks that stop getting on are named, and replaced in seconds; the bits do not change."""

from __future__ import annotations

from tests.chaos.test_kill import callback
from tests.command import CALM, Workplace
from tests.commands.test_torchrun import torchrun
from tests.commands.watch import assert_nothing_left


def test_a_suspended_and_a_deadlocked_rank(workplace: Workplace, calm: Workplace) -> None:
    hang = callback(
        "HangAt",
        folder=str(workplace.path / "marks"),
        at=[[2, 0, "suspend"], [8, 1, "deadlock"], [9, 1, "deadlock"]],
    )
    deadline = "resilience.step_deadline_seconds=8"
    workplace.train(*CALM, "checkpoint.every=4", deadline, f"callbacks=[{hang}]")
    suspended, deadlocked, again = workplace.events("failure")
    assert (suspended["kind"], suspended["rank"]) == ("hang", 0)
    assert "suspended (SIGSTOP)" in suspended["cause"] and "step 3" in suspended["cause"]
    assert "T (stopped)" in suspended["evidence"]
    assert (deadlocked["kind"], deadlocked["rank"]) == ("hang", 1)
    assert "no progress" in deadlocked["cause"] and "step 9, compute" in deadlocked["cause"]
    assert "never_get_on" in deadlocked["evidence"], "its stack"
    # In the second step of its process, which goes by the deadlines of the one before.
    assert (again["kind"], again["rank"]) == ("hang", 1)
    assert "step 10, compute, which is over its deadline" in again["cause"]
    assert all(failure["began"] < failure["time"] for failure in (suspended, deadlocked, again))
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()
    assert_nothing_left(workplace)


def test_without_an_agent_a_deadlocked_rank_leaves(workplace: Workplace, calm: Workplace) -> None:
    hang = callback("HangAt", folder=str(workplace.path / "marks"), at=[[9, 1, "deadlock"]])
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    deadline = "resilience.step_deadline_seconds=8"
    output = torchrun(workplace, options, "run.id=a", deadline, f"callbacks=[{hang}]")
    assert "does not get on: over its deadline at step 10, compute" in output
    assert "never_get_on" in output, "the stack of the rank that is to blame"
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()
    assert_nothing_left(workplace)
