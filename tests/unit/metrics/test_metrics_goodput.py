import pytest
from metrics_helpers import T0, checkpoint, event, failure, finish, restart, resume, start, step

from trainer.metrics.goodput import GoodputMeter, account
from trainer.metrics.schema import Record


def test_nothing_happened() -> None:
    assert account([], []).goodput == 0.0
    assert account([start(0.0)], []).wall == 0.0


def test_startup_evaluation_and_stalls() -> None:
    # 3 s of start-up, an evaluation of 1 s, 4 steps of 1 s with a stall of 0.5 s, and 0.25 s nobody explains.
    events = [
        start(0.0),
        event("evaluation", 4.0, 0, loss_valid=8.0, best=True, seconds=1.0),
        checkpoint(6.5, 2, 0.5),
        finish(8.75, 4),
    ]
    found = account(events, [step(1, 5.0), step(2, 6.0), step(3, 7.5), step(4, 8.5)])
    assert found.startup == pytest.approx(3.0)
    assert found.evaluation == 1.0 and found.checkpoint == 0.5
    assert found.useful == 4.0 and found.other == pytest.approx(0.25)
    assert found.wall == pytest.approx(8.75) and found.goodput == pytest.approx(4.0 / 8.75)


def crashed() -> tuple[list[Record], list[Record]]:
    """Steps of 1 s from 2 s on, a checkpoint at 3, a crash after 5, found 0.5 s later, back after 2 + 1 s."""
    events = [
        start(0.0), checkpoint(5.0, 3, 0.0), failure(7.5, 5),
        start(9.5, generation=1), restart(9.5, 3, 1, 2.0, 2), resume(10.0, 3), finish(13.5, 6),
    ]  # fmt: skip
    records = [step(n, 2.0 + n) for n in (1, 2, 3)] + [step(n, 10.5 + n - 3) for n in (4, 5, 6)]
    return events, records


def test_a_crash() -> None:
    found = account(*crashed())
    assert found.useful == 6.0
    assert found.recompute == pytest.approx(2.0)
    # Detection 0.5, the gap 2.0, loading and warming up 1.0.
    assert found.restart == pytest.approx(3.5)
    assert found.startup == pytest.approx(2.0) and found.other == pytest.approx(0.0)
    assert found.wall == pytest.approx(13.5)


def test_steps_that_were_never_logged_count_where_they_ran() -> None:
    # Every second step is logged; the checkpoint is at 3, of which only 2 was logged.
    events, records = crashed()
    records = [step(2, 4.0), step(4, 11.5), step(6, 13.5)]
    found = account(events, records)
    assert found.useful == pytest.approx(6.0) and found.recompute == pytest.approx(2.0)
    assert found.restart == pytest.approx(3.5) and found.other == pytest.approx(0.0)


def test_a_failed_restart_is_all_restart() -> None:
    events = [
        start(0.0), failure(4.0, 2), start(6.0, generation=1), failure(9.0, 0, "hang"),
        start(10.0, generation=2), restart(10.0, 2, 2, 6.0, 0), resume(10.5, 2), finish(13.0, 4),
    ]  # fmt: skip
    found = account(events, [step(1, 3.0), step(2, 4.0), step(3, 12.0), step(4, 13.0)])
    assert found.useful == 4.0 and found.startup == pytest.approx(2.0)
    assert found.restart == pytest.approx(7.0) and found.wall == pytest.approx(13.0)


def test_time_without_machines_is_listed_but_not_counted() -> None:
    events = [
        start(0.0), event("stop", 3.0, 2, reason="SIGTERM", resumable=True),
        start(1003.0, generation=1), resume(1003.5, 2), finish(1006.0, 4),
    ]  # fmt: skip
    found = account(events, [step(1, 2.0), step(2, 3.0), step(3, 1005.0), step(4, 1006.0)])
    assert found.stopped == 1000.0 and found.wall == pytest.approx(6.0)
    assert found.startup == pytest.approx(2.0) and found.useful == 4.0


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 5.0, 1e9, float("nan")])
def test_the_parts_are_the_whole_whatever_is_claimed(seconds: float) -> None:
    events, records = crashed()
    events[1]["stall_seconds"] = seconds
    for record in records:
        record["perf/step_seconds"] = seconds
    found = account(events, records)
    assert found.wall == pytest.approx(13.5) and 0.0 <= found.goodput <= 1.0


def test_the_meter_agrees_with_the_account() -> None:
    events, records = crashed()
    meter = GoodputMeter(events[:-1], records[:3])
    for record in records[3:]:
        meter.steps(record["perf/step_seconds"])
    meter.event(checkpoint(13.5, 6, 0.25))
    found = meter.metrics(T0 + 13.5)
    assert found["ft/goodput"] == pytest.approx(account(events, records).goodput)
    assert found["ft/lost_steps"] == 2 and found["ft/restart_seconds"] == 2.0
    assert found["ft/checkpoint_stall_seconds"] == 0.25
