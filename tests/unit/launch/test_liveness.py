"""Suspended and stuck workers over real processes: who is named, and who is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.agent import Agent
from launch.kernel import kernel_messages
from trainer.deadlines import Deadlines, depends_on
from trainer.liveness import Page, Pulse, page_file
from trainer.metrics.jsonl import read_events
from trainer.rundir import RunDirectory

Worker = Callable[[str], list[str]]
Make = Callable[..., Agent]

BEATS = """
from trainer.liveness import Pulse
pulse = Pulse.of_agent()
pulse.start()
"""


def failures(run: RunDirectory) -> list[dict]:
    return [event for event in read_events(run.path / "events.jsonl") if event["event"] == "failure"]


@pytest.fixture
def page() -> Page:
    descriptor = page_file()
    try:
        return Page(descriptor)
    finally:
        os.close(descriptor)


def test_a_suspended_worker_is_named_and_replaced(
    run: RunDirectory, worker: Worker, make_agent: Make
) -> None:
    body = """
if generation == 0:
    mark(f"ready-{rank}")
    wait_for("ready-0"); wait_for("ready-1")
    pulse.enter("compute", 7)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    sleep_forever()
"""
    assert make_agent(worker(BEATS + body), heartbeat=1.0).run().code == 0
    (failure,) = failures(run)
    assert (failure["rank"], failure["kind"]) == (1, "hang")
    assert "suspended (SIGSTOP)" in failure["cause"] and "step 7, compute" in failure["cause"]
    assert "T (stopped)" in failure["evidence"]
    assert failure["time"] - failure["began"] > 0.9, "it began with the last beat"


def test_a_worker_that_does_not_get_on_is_named_with_its_stack(
    run: RunDirectory, worker: Worker, make_agent: Make
) -> None:
    body = """
def stuck_here():
    sleep_forever()

if generation == 0:
    pulse.expect(600.0, 0.5, 2.0)
    pulse._counts = False  # there are no collectives to count here: they are told below
    for step in range(20):
        pulse.enter("compute", step + 1)
    pulse.page.set("collectives", 41 - rank)
    stuck_here() if rank == 1 else sleep_forever()
"""
    assert make_agent(worker(BEATS + body)).run().code == 0
    (failure,) = failures(run)
    assert (failure["rank"], failure["kind"]) == (1, "hang")
    assert "no progress" in failure["cause"] and "step 20, compute" in failure["cause"]
    assert "rank 0: step 20, compute, 41 collectives" in failure["cause"]
    assert "stuck_here" in failure["evidence"]


def test_a_worker_that_cannot_beat_but_is_not_suspended_is_left_alone(
    run: RunDirectory, worker: Worker, make_agent: Make
) -> None:
    body = """
import ctypes
pulse.enter("compute", 1)
ctypes.PyDLL(None).usleep(2_500_000)  # in C, with the interpreter's lock held
"""
    assert make_agent(worker(BEATS + body), heartbeat=1.0).run().code == 0
    assert not failures(run)


def test_a_worker_behind_is_blamed_for_a_timeout_of_another(
    run: RunDirectory, worker: Worker, make_agent: Make
) -> None:
    body = """
if generation == 0:
    pulse.page.set("collectives", 8 if rank else 9)
    mark(f"told-{rank}")
    wait_for("told-0"); wait_for("told-1")
    if rank == 0:
        die("RuntimeError: [gloo] Timed out waiting 1000ms for recv operation to complete")
    sleep_forever()
"""
    assert make_agent(worker(BEATS + body)).run().code == 0
    (failure,) = failures(run)
    assert (failure["rank"], failure["kind"]) == (1, "hang")
    assert "8 collectives while the others waited for it" in failure["cause"]


def test_steps_committed_in_any_tier_refill_the_budget(
    run: RunDirectory, worker: Worker, make_agent: Make
) -> None:
    body = "pulse.commit(generation + 1)\nif generation < 4: die('ValueError: again')"
    assert make_agent(worker(BEATS + body), num_workers=1, max_restarts=1).run().code == 0
    assert len(failures(run)) == 4


def test_deadlines_are_learned_where_phases_repeat(page: Page) -> None:
    pulse = Pulse(page)
    pulse.enter("compute", 1)
    assert page.read().deadline == 0, "none before they are asked for"
    pulse.expect(600.0, 60.0, 10.0)

    def allowed() -> float:
        vitals = page.read()
        return (vitals.deadline - vitals.progress) / 1e9

    for step in range(1, 21):
        pulse.enter("compute", step)
        assert allowed() == pytest.approx(600.0 if step < 16 else 60.0)
    pulse.enter("evaluation")
    assert allowed() == pytest.approx(600.0), "a hook or an evaluation may take what it takes"
    assert (page.read().step, str(page.read())) == (20, "step 20, evaluation, 0 collectives")


def test_deadlines_outlive_a_restart_in_the_same_layout(page: Page, tmp_path: Path) -> None:
    values = {name: name for name in ("device", "engine", "layout", "model", "parallel", "train")}
    of = depends_on(values, 2)
    first, again, other = Pulse(), Pulse(page), Pulse()
    for pulse in (first, again, other):
        pulse.expect(600.0, 0.0, 10.0)
    kept = Deadlines(tmp_path, of, first, writes=True)
    kept.recall()
    for _ in range(15):
        first.enter("compute")
    kept.stepped()
    assert not (tmp_path / "deadlines.json").exists(), "too few"
    for _ in range(2):
        first.enter("compute")
    longest = first.learned()["compute"]
    assert 0 < longest < 60 and "data" not in first.learned()
    kept.stepped()

    Deadlines(tmp_path, of, again, writes=False).recall()
    again.enter("compute", 1)
    assert page.read().deadline - page.read().progress == pytest.approx(longest * 10e9, abs=2)
    again.enter("data")
    assert page.read().deadline - page.read().progress == pytest.approx(600e9), "nobody knows"
    for values_of in (depends_on(values, 4), depends_on({**values, "parallel": "ep 2"}, 2)):
        Deadlines(tmp_path, values_of, other, writes=False).recall()
        assert other._recalled == {}
    (tmp_path / "deadlines.json").write_text('{"of": "')  # torn
    Deadlines(tmp_path, of, other, writes=False).recall()
    assert other._recalled == {}


def test_kernel_messages_are_no_error_where_they_cannot_be_read() -> None:
    assert kernel_messages(since=4e9) == ""
