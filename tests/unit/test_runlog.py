"""The run's log over generations: restarts, the W&B id, alarms that come before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config import RunConfig, Terminal, WandbMode
from trainer.metrics.jsonl import events_writer, read_events, read_metrics
from trainer.metrics.recovery import PARTS
from trainer.runlog import RunLog

START = {
    "world_size": 2,
    "parallel": "ep 2",
    "device": "cpu",
    "num_parameters": 1,
    "num_active_parameters": 1,
    "run_dir": "",
    "steps": 9,
    "train_rows": 1,
    "tokens_per_step": 4,
    "config": {},
}


def open_log(run_dir: Path, mode: WandbMode = WandbMode.disabled) -> RunLog:
    config = RunConfig()
    config.run.name, config.run.id = "a name", "x/1"
    config.logger.terminal, config.logger.wandb.mode = Terminal.off, mode
    return RunLog(run_dir, config, {}, active=True, terminal=False)


def begin(run_dir: Path, generation: int, step: int) -> RunLog:
    log = open_log(run_dir)
    resume = {"tier": "durable", "path": "p"} if step else None
    log.begin(step, {"generation": generation, **START}, resume)
    return log


def log_steps(log: RunLog, steps: range) -> None:
    for step in steps:
        log.stepped(step)
        log.metrics({"step": step, "tokens": 4 * step, "loss/train": 1.0, "perf/step_seconds": 0.01}, 0.01)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir / "events.jsonl") if event["event"] == kind]


def test_a_generation_that_died_is_followed_by_a_restart(tmp_path: Path) -> None:
    log = begin(tmp_path, 0, 0)
    log_steps(log, range(1, 8))
    with events_writer(tmp_path) as writer:
        failed = {
            "time": 0.0,
            "step": 7,
            "event": "failure",
            "kind": "crash",
            "rank": 1,
            "host": "h",
            "cause": "c",
        }
        died = read_metrics(tmp_path / "metrics.jsonl")[-1]["time"]
        writer.write({**failed, "time": died})
    log = begin(tmp_path, 1, 4)
    (restart,) = events(tmp_path, "restart")
    assert (restart["generation"], restart["lost_steps"], restart["step"]) == (1, 3, 4)
    span = events(tmp_path, "start")[1]["time"] - died
    assert restart["restart_seconds"] == pytest.approx(span, abs=0.05)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert events(tmp_path, "recovered") == []
    log_steps(log, range(5, 9))
    (recovered,) = events(tmp_path, "recovered")
    assert (recovered["step"], recovered["kind"], recovered["generation"]) == (7, "crash", 1)
    spent = [recovered[f"{part}_seconds"] for part in PARTS]
    assert min(spent) >= 0 and sum(spent) == pytest.approx(recovered["seconds"])
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["ft/lost_steps"] == 3
    assert last["ft/restart_seconds"] == restart["restart_seconds"]


@pytest.mark.parametrize("end", ["stop", "finish"])
def test_a_generation_that_ended_in_order_is_not(tmp_path: Path, end: str) -> None:
    log = begin(tmp_path, 0, 0)
    if end == "stop":
        log.event("stop", 3, reason="asked", resumable=True)
    else:
        names = "weights_digest goodput seconds loss_valid loss_valid_untrained unigram_loss"
        log.event("finish", 3, **dict.fromkeys([*names.split(), "best_step", "best_loss", "sample"]))
    begin(tmp_path, 1, 3)
    assert events(tmp_path, "restart") == []


def test_every_generation_has_the_same_wandb_id_and_another_run_has_another(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, again = begin(tmp_path / "one", 0, 0), begin(tmp_path / "one", 1, 0)
    other = begin(tmp_path / "two", 0, 0)
    assert first.wandb_id == again.wandb_id
    assert first.wandb_id != other.wandb_id
    assert first.wandb_id.startswith("a-name-x-1-")


def test_wandb_that_cannot_start_is_an_alarm_after_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    log = open_log(tmp_path, WandbMode.online)
    log.begin(0, {"generation": 0, **START}, None)
    log_steps(log, range(1, 3))
    log.close()
    kinds = [event["event"] for event in read_events(tmp_path / "events.jsonl")]
    assert kinds == ["start", "alarm"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
