import pytest
from metrics_helpers import T0, checkpoint, event, failure, finish, recovered, restart, resume, start, step

from trainer.metrics.goodput import GoodputMeter, account
from trainer.metrics.recovery import RecoveryClock, follow, merged
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
    assert found.useful == pytest.approx(6.0) and found.startup == pytest.approx(2.0)
    # The two steps that were lost were over at 7; loading is not told apart; 4 and 5 again, with a warm-up.
    assert found.detect == pytest.approx(0.5) and found.restart == pytest.approx(2.5)
    assert found.recompute == pytest.approx(2.5)
    assert found.other == pytest.approx(0.0) and found.wall == pytest.approx(13.5)


def test_what_the_events_tell_is_believed() -> None:
    # The fault was at 6.2, in the fifth step (the fourth was not logged either); loading took 1.5 s.
    events, records = crashed()
    events[2] |= {"began": 6.2, "step": 4}
    events[2]["began"] += T0
    events[4]["lost_steps"] = 1
    events[5]["load_seconds"] = 1.5
    found = account(events, records)
    assert found.detect == pytest.approx(1.3) and found.load == pytest.approx(1.5)
    assert found.restart == pytest.approx(1.0)
    assert found.recompute == pytest.approx(0.2 + 1.5), "what the fault cut off, and step 4 again"
    assert found.useful == pytest.approx(6.0) and found.wall == pytest.approx(13.5)


def test_steps_that_were_never_logged_count_where_they_ran() -> None:
    # Every second step is logged; the checkpoint is at 3, of which only 2 was logged.
    events, records = crashed()
    records = [step(2, 4.0), step(4, 11.5), step(6, 13.5)]
    spent = {"detect_seconds": 0.5, "restart_seconds": 2.5, "load_seconds": 0.0, "recompute_seconds": 2.5}
    events.insert(-1, recovered(12.5, 5, 1, **spent))
    found = account(events, records)
    assert found.useful == pytest.approx(6.0) and found.recompute == pytest.approx(2.5)
    assert found.restart == pytest.approx(2.5) and found.other == pytest.approx(0.0)


def test_a_fault_in_a_restart_belongs_to_the_same_recovery() -> None:
    events = [
        start(0.0), failure(4.0, 2), start(6.0, generation=1), failure(9.0, 0, "hang"),
        start(10.0, generation=2), restart(10.0, 2, 2, 6.0, 0), resume(10.5, 2), finish(13.0, 4),
    ]  # fmt: skip
    records = [step(1, 3.0), step(2, 4.0), step(3, 12.0), step(4, 13.0)]
    found = account(events, records)
    assert found.useful == 4.0 and found.startup == pytest.approx(2.0)
    assert found.detect == pytest.approx(3.0), "the hang began with its generation"
    assert found.restart == pytest.approx(4.0) and found.wall == pytest.approx(13.0)


def test_a_fault_in_a_recomputation_belongs_to_the_same_recovery() -> None:
    # Ten steps of 1 s; a fault at 10, back from step 5; at step 8 another one, back from 5 again.
    crash = [
        failure(10.5, 10) | {"began": T0 + 10.0},
        start(12.0, 1),
        resume(12.0, 5) | {"load_seconds": 1.0},
    ]
    again = [failure(15.5, 8) | {"began": T0 + 15.0}, start(17.0, 2), resume(17.0, 5) | {"load_seconds": 0.5}]
    records = [step(n, float(n)) for n in range(1, 6)] + [step(n, 12.0 + n) for n in range(6, 13)]
    events = [start(0.0), *crash, *again, finish(24.0, 12)]
    found = account(events, records)
    assert found.useful == pytest.approx(12.0)
    assert found.detect == pytest.approx(1.0) and found.load == pytest.approx(1.5)
    assert found.restart == pytest.approx(0.5 + 1.0) and found.recompute == pytest.approx(3.0 + 5.0)
    assert found.wall == pytest.approx(24.0) and found.other == pytest.approx(0.0)
    clock, said = RecoveryClock(), []
    for entry in merged(events, [step(n, 12.0 + n) for n in range(6, 13)]):
        said += [clock.event(entry)] if "event" in entry else [clock.step(entry["step"], entry["time"])]
    (only,) = [fields for fields in said if fields]
    assert (only["kind"], only["generation"], only["failures"]) == ("crash", 2, 2)
    assert only["seconds"] == pytest.approx(12.0) and only["recompute_seconds"] == pytest.approx(8.0)


def test_a_run_that_begins_again_recovers_each_time_anew() -> None:
    # Nothing was saved: killed at 4, back at 0 and at 4 again, killed there, and so on.
    events, records = [start(0.0)], [step(n, float(n)) for n in (1, 2, 3, 4)]
    for number, began in enumerate((4.0, 14.0, 24.0), start=1):
        parts = {"detect_seconds": 1.0, "restart_seconds": 5.0, "load_seconds": 0.0, "recompute_seconds": 4.0}
        events += [failure(began + 1, 4) | {"began": T0 + began}, start(began + 6, number)]
        events += [restart(began + 6, 0, number, 5.0, 4), recovered(began + 10, 4, number, **parts)]
    found = account(events, records)  # of the records only those of the last generation would be there
    assert found.detect == 3.0 and found.restart == 15.0 and found.recompute == 12.0
    clock = follow(events, [], 1.0)
    clock.event(failure(35.0, 4) | {"began": T0 + 34.0})
    clock.event(start(40.0, 4))
    fields = clock.step(4, T0 + 44.0)
    assert fields is not None and (fields["failures"], fields["seconds"]) == (1, 10.0)


def test_a_rollback_in_the_running_process_is_a_recovery_and_a_failed_save_is_none() -> None:
    # Step 5 was not finite; back to 3 within a second.
    events = [
        start(0.0), failure(3.2, 2, "storage"), failure(5.0, 5, "non-finite") | {"began": T0 + 4.0},
        event("rollback", 6.0, 3, from_step=4, restores=1, reason="non-finite", load_seconds=0.75), finish(9.0, 6),
    ]  # fmt: skip
    records = [step(n, float(n)) for n in (1, 2, 3)] + [step(n, 3.0 + n) for n in (4, 5, 6)]
    found = account(events, records)
    assert found.detect == 1.0 and found.load == 0.75 and found.restart == 0.25
    assert found.recompute == 1.0 and found.useful == 6.0 and found.wall == 9.0


def test_slow_steps_are_useful_up_to_the_median() -> None:
    # Steps 3 and 4 took 3 s each; then the straggler was noticed and left alone.
    events = [start(0.0), failure(8.0, 4, "straggler") | {"began": T0 + 2.0}, finish(11.0, 7)]
    times = {1: 1.0, 2: 2.0, 3: 5.0, 4: 8.0, 5: 9.0, 6: 10.0, 7: 11.0}
    records = [step(n, time, seconds=3.0 if n in (3, 4) else 1.0) for n, time in times.items()]
    found = account(events, records)
    assert found.useful == 7.0 and found.straggling == 4.0 and found.wall == 11.0


def test_a_straggler_that_is_only_named_costs_what_its_steps_took_beyond_the_median() -> None:
    # Slow from step 3 to 6: told after 4, again after 6; it is no interruption.
    def named(time: float, at: int, began: float) -> Record:
        return event("alarm", time, at, kind="straggler", message="rank 1 is slow", began=T0 + began)

    events = [start(0.0), named(8.0, 4, 2.0), named(14.0, 6, 8.0), finish(19.0, 11)]
    records, time = [], 0.0
    for n in range(1, 12):
        seconds = 3.0 if 3 <= n <= 6 else 1.0
        time += seconds
        records.append(step(n, time, seconds=seconds))
    found = account(events, records)
    assert found.useful == 11.0 and found.straggling == 8.0 and found.wall == 19.0


def test_a_death_that_nobody_reported_is_a_restart() -> None:
    events = [start(0.0), start(5.0, 1), resume(5.0, 2) | {"load_seconds": 1.0}, finish(8.0, 5)]
    records = [step(1, 1.0), step(2, 2.0), step(3, 6.0), step(4, 7.0), step(5, 8.0)]
    found = account(events, records)
    assert (found.detect, found.restart, found.load) == (0.0, 2.0, 1.0) and found.useful == 5.0


def test_time_without_machines_is_listed_but_not_counted() -> None:
    events = [
        start(0.0), event("stop", 3.0, 2, reason="SIGTERM", resumable=True),
        start(1003.0, generation=1), resume(1003.5, 2), finish(1006.0, 4),
    ]  # fmt: skip
    records = [step(1, 2.0), step(2, 3.0), step(3, 1005.0), step(4, 1006.0)]
    found = account(events, records)
    assert found.stopped == 1000.0 and found.wall == pytest.approx(6.0)
    assert found.startup == pytest.approx(2.0) and found.useful == 4.0
    events[3]["load_seconds"] = 2.0  # that was spent before its start
    assert account(events, records).stopped == 998.5 and account(events, records).load == 2.0


def test_nodes_that_regroup_are_held_meanwhile() -> None:
    events = [
        start(0.0), event("regroup", 3.0, 2, reason="node-b can be taken in"),
        event("stop", 4.0, 3, reason="asked to stop", resumable=True), start(7.0, generation=1), finish(9.0, 5),
    ]  # fmt: skip
    found = account(events, [step(1, 2.0), step(2, 3.0), step(3, 4.0), step(4, 8.0), step(5, 9.0)])
    assert found.stopped == 0.0 and found.wall == pytest.approx(9.0)
    assert found.restart == pytest.approx(3.0)


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
        meter.steps(record["step"], record["perf/step_seconds"])
    meter.event(checkpoint(13.5, 6, 0.25))
    found = meter.metrics(T0 + 13.5)
    assert found["ft/goodput"] == pytest.approx(account(events, records).goodput)
    assert found["ft/lost_steps"] == 2 and found["ft/restart_seconds"] == 2.0
    assert found["ft/checkpoint_stall_seconds"] == 0.25
