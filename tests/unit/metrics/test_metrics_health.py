"""Alarms and maps where people look: the live view, the summary, W&B, the report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from metrics_helpers import (
    alarm,
    checkpoint,
    finish,
    maps,
    moe,
    resume,
    start,
    step,
    window,
    write,
    write_health,
)  # fmt: skip
from test_metrics_report import Page

from trainer.metrics.health import episodes
from trainer.metrics.history import History
from trainer.metrics.live import State, render
from trainer.metrics.report import write_report
from trainer.metrics.summary import summary_rows
from trainer.metrics.wandb_sink import WandbSink

RAISED = alarm(30.0, 30, "collapse", "raised", [1, 3], [1, 3])
PARTLY = alarm(40.0, 40, "collapse", "cleared", [1], [3])
OVER = alarm(50.0, 50, "collapse", "cleared", [3], [])


def shown(state: State) -> str:
    return "\n".join(line.plain for line in render(state, 120, 40))


def test_an_open_alarm_stays_in_sight_until_it_is_over() -> None:
    state = State(total_steps=100)
    for event in (start(0.0), RAISED, *(checkpoint(30.0 + n, 30 + n, 0.1) for n in range(9)), PARTLY):
        state.event(event)
    assert "! collapse  since step 28  trouble in [1, 3]" in shown(state)
    assert "raise layout.balance.coefficient" in shown(state)
    state.event(OVER)
    assert "! collapse" not in shown(state) and "✓ step 50  alarm  collapse: trouble in [3]" in shown(state)


def test_a_resume_takes_back_what_was_said_later() -> None:
    state = State(total_steps=100)
    for event in (start(0.0), RAISED, start(60.0, 1), resume(61.0, 30)):
        state.event(event)
    assert "! collapse" in shown(state)
    state.event(resume(62.0, 29))
    assert "! collapse" not in shown(state)
    assert episodes([RAISED, resume(61.0, 29)]) == []
    assert [episode.until for episode in episodes([RAISED, PARTLY, OVER])] == [50]
    assert [episode.until for episode in episodes([RAISED, PARTLY, OVER, resume(61.0, 45)])] == [None]
    again = [RAISED, PARTLY, OVER, resume(61.0, 45), OVER]
    assert [(episode.since, episode.until) for episode in episodes(again)] == [(28, 50)]


def test_the_summary_counts_alarms(tmp_path: Path) -> None:
    run = write(tmp_path / "r", [start(0.0), RAISED, PARTLY, finish(60.0, 60)], [step(60, 60.0) | moe()])
    assert dict(summary_rows(History.load(run)))["routing"] == "1 alarm; not over: collapse since step 28"
    calm = write(tmp_path / "c", [start(0.0)], [step(1, 1.0)])
    assert "routing" not in dict(summary_rows(History.load(calm)))
    write_health(calm, [window(10)])
    assert dict(summary_rows(History.load(calm)))["routing"] == "no alarm"


def test_alerts_say_what_began_and_what_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    failed: list[tuple[str, str]] = []
    sink = WandbSink(
        tmp_path,
        mode="offline",
        run_id="a",
        project="p",
        name="n",
        on_alarm=lambda *told: failed.append(told),
    )
    alert = sink._run.alert
    monkeypatch.setattr(sink._run, "alert", lambda **fields: (said.append(fields), alert(**fields)))
    sink.event(RAISED)
    sink.event(OVER)
    sink.close()
    assert [(alert["title"], alert["level"]) for alert in said] == [
        ("alarm: collapse", "WARN"), ("alarm: collapse", "INFO"),
    ]  # fmt: skip
    assert failed == [], "W&B took them"


@pytest.mark.parametrize(("layers", "experts", "ranks"), [(1, 4, 2), (2, 64, 4), (20, 128, 8)])
def test_the_report_draws_them(tmp_path: Path, layers: int, experts: int, ranks: int) -> None:
    run = write(
        tmp_path / "r", [start(0.0), RAISED, PARTLY],
        [step(n, float(n)) | moe(layers, experts) | {"moe/wait_seconds": 0.1} for n in range(1, 4)],
    )  # fmt: skip
    write_health(
        run, [*(window(n, layers, ranks) for n in (10, 20)), *(maps(n, layers, experts) for n in (5, 40))]
    )
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text).text
    for part in ("1 of the routing, 1 not over", "trouble in [1, 3] <i>", "Balance of the ranks", "ep rank",
                 "Experts chosen together", "held-out rows, step 40", "Specialisation by domain", "code ",
                 "Specialisation over time", "Waiting for other ranks"):  # fmt: skip
        assert part in page, part
    assert "<i>" not in text
    assert ("1 + 2" in page) == (experts > 64)
    assert ("12 of 20 layers" in page) == (layers > 12) == ("The 12 least even of 20 layers" in page)
    assert not re.search(r'href="(?!#|data:)', text)
