"""A step that is not finite does not commit: redone, then stepped over, and the bits are those of a calm run."""

from __future__ import annotations

import pytest

from tests.chaos.test_kill import callback
from tests.command import CALM, Workplace

RUN = [*CALM, "checkpoint.every=4"]


def spoil(**kwargs: object) -> str:
    return f"callbacks=[{callback('SpoilGradients', **kwargs)}]"


def test_a_fault_that_passes_changes_no_bit(workplace: Workplace, calm: Workplace) -> None:
    workplace.train(*RUN, spoil(step=5, rank=1))
    (alarm,) = workplace.events("alarm")
    assert (alarm["kind"], alarm["step"], alarm["rank"], alarm["action"]) == ("non_finite", 6, 1, "redone")
    assert "its part of the gradient of" in alarm["message"]
    assert not workplace.events("failure")
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()


def test_a_batch_that_always_fails_is_stepped_over_once_and_for_all(workplace: Workplace) -> None:
    bad = spoil(step=5, rank=0, always=True)
    workplace.train(*RUN, bad)
    alarms = workplace.events("alarm")
    actions = [(6, "redone"), (6, "rolled back"), (6, "stepped over")]
    assert [(alarm["step"], alarm["action"]) for alarm in alarms] == actions
    losses = workplace.losses()
    assert sorted(losses) == [1, 2, 3, 4, 5, *range(7, 13)], "nothing is logged for what was not trained"

    # Killed after the skip and gone on from before it: the ledger knows, whatever the batch does now.
    killed = workplace.path / "runs" / "e2e" / "killed"
    killer = callback("KillAt", folder=str(workplace.path / "marks"), at=[[7, 1]], every=4)
    workplace.train(*RUN, "run.id=killed", f"{bad[:-1]},{killer}]")
    assert [event["step"] for event in workplace.events("resume", killed)] == [4]
    again = [(alarm["step"], alarm["action"]) for alarm in workplace.events("alarm", killed)]
    assert again == actions, "not attempted again"
    assert workplace.digest(killed) == workplace.digest()
    assert workplace.losses(killed) == losses


@pytest.mark.long
def test_over_the_budget_it_gives_up_with_one_message(workplace: Workplace) -> None:
    bad = spoil(step=3, rank=1, always=True, steps=3)
    output = workplace.train(*RUN, bad, "guard.max_skips_in_a_row=2", expect=70)
    assert "Traceback" not in output
    assert "Gave up over non-finite: no restart would mend it." in output
    assert "2 batches were stepped over before it (guard.max_skips_in_a_row=2)" in output
    (failure,) = workplace.events("failure")
    assert (failure["kind"], failure["rank"], failure["exit_code"]) == ("non-finite", 1, 70)
    assert "step 6 is not finite (rank 1 on" in failure["cause"]
    assert not workplace.events("restart")


def test_a_flipped_bit_is_named_and_undone(workplace: Workplace, calm: Workplace) -> None:
    flip = f"callbacks=[{callback('FlipBit', step=5, rank=1)}]"
    workplace.train(*RUN, flip, "guard.digest_every=1")
    (failure,) = workplace.events("failure")
    assert (failure["kind"], failure["step"], failure["rank"]) == ("corruption", 5, 1)
    assert failure["evidence"].startswith("model.layers.0.")
    (rollback,) = workplace.events("rollback")
    assert rollback["step"] <= 4, "step 5 was kept when the digest was taken, maybe after the flip"
    assert "met silent corruption (rank 1 on" in rollback["reason"]
    assert not workplace.events("restart")
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()


@pytest.mark.long
def test_a_rank_that_flips_bits_again_and_again_fails_by_name(workplace: Workplace) -> None:
    flip = f"callbacks=[{callback('FlipBit', step=2, rank=1, always=True)}]"
    options = ["guard.digest_every=1", "guard.max_rollbacks=1", "resilience.max_restarts=0"]
    output = workplace.train(*RUN, flip, *options, expect=70)
    blamed = [(failure["kind"], failure["rank"]) for failure in workplace.events("failure")]
    assert blamed == [("corruption", 1)] * 3, "found twice, and then the end of the process"
    assert "2 times (guard.max_rollbacks=1)" in output


def test_what_the_device_decided_is_learnt_before_it_is_built_upon(
    workplace: Workplace, calm: Workplace
) -> None:
    """A NaN in one step and a flipped bit in another: both are noticed one step later, and undone."""
    faults = [
        callback("DecideOnDevice"),
        callback("SpoilGradients", step=5, rank=1),
        callback("FlipBit", step=9, rank=0),
    ]
    workplace.train(*RUN, f"callbacks=[{','.join(faults)}]", "guard.digest_every=1")
    (alarm,) = workplace.events("alarm")
    assert (alarm["kind"], alarm["step"], alarm["action"]) == ("non_finite", 6, "rolled back")
    (failure,) = workplace.events("failure")
    assert (failure["kind"], failure["step"], failure["rank"]) == ("corruption", 9, 0)
    assert [(event["from_step"], event["step"]) for event in workplace.events("rollback")] == [
        (6, 4),
        (10, 8),
    ]
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()
