"""The table after a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.metrics.health import episodes
from trainer.metrics.history import History
from trainer.metrics.schema import as_float, interrupts
from trainer.metrics.text import count_text, percent_text, seconds_text
from trainer.metrics.wandb_sink import sync_hint


def final_summary(console: Console, run_dir: Path) -> None:
    """Print what a run did and where its results are, from its files.

    Raises:
        ConfigError: the directory holds no run.
    """
    history = History.load(run_dir)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in summary_rows(history):
        table.add_row(label, Text(value))
    console.print()
    console.print(Text(f"{history.name}: {history.state}", style="bold"))
    console.print(table)
    sample = history.finish.get("sample")
    if sample:
        text = Text.assemble((str(sample["prompt"]), "bold"), str(sample["text"]))
        console.print(Text("\nsample", style="dim"))
        console.print(text, soft_wrap=True)
    console.print()
    # These are there to be copied: they must not be wrapped.
    for label, value in result_lines(run_dir):
        line = Text.assemble((f"{label:<11}  ", "dim"), value)
        console.print(line, soft_wrap=True)


def summary_rows(history: History) -> list[tuple[str, str]]:
    """(label, value) of each fact that the run's files tell, most wanted first."""
    start, finish, losses = history.start, history.finish, history.losses()
    last = history.records[-1] if history.records else {}
    account = history.account
    rows: list[tuple[str, str | None]] = [
        ("steps", _of(last.get("step", finish.get("step")), start.get("steps"))),
        ("tokens", count_text(last["tokens"]) if last else None),
        ("time", seconds_text(as_float(finish.get("seconds", account.wall)))),
        ("tokens/s", _maybe(history.mean_rate(), count_text)),
        ("MFU", _median(history, "perf/mfu")),
        ("train loss", _maybe(losses.get("train"), "{:.3f}".format)),
        ("valid loss", valid_text(losses)),
        ("best", best_text(history, losses)),
        ("failures", failures_text(history)),
        ("routing", alarms_text(history)),
        ("goodput", percent_text(as_float(finish.get("goodput", account.goodput)))),
    ]
    return [(label, value) for label, value in rows if value is not None]


def result_lines(run_dir: Path) -> list[tuple[str, str]]:
    """(label, path or command) of what the run left behind."""
    paths = {"report": run_dir / "report.html", "checkpoints": run_dir / "checkpoints"}
    lines = [(label, str(path)) for label, path in paths.items() if path.exists()]
    directories, command = sync_hint(run_dir)
    if command is not None:
        lines += [("W&B", str(directories[-1])), ("W&B upload", command)]
    return lines


def valid_text(losses: dict[str, float]) -> str | None:
    """``4.123 nats a token: 4.21 below untrained (8.333), 1.50 below unigram (5.62)``; None without one."""
    if "valid" not in losses:
        return None
    notes = []
    for name, other in (("untrained", "the untrained model"), ("unigram", "a unigram model")):
        if name in losses:
            gap = losses[name] - losses["valid"]
            notes.append(f"{abs(gap):.2f} {'below' if gap >= 0 else 'above'} {other} ({losses[name]:.3f})")
    return f"{losses['valid']:.3f} nats a token" + (": " if notes else "") + ", ".join(notes)


def best_text(history: History, losses: dict[str, float]) -> str | None:
    """The best validation loss and its step."""
    if "best" not in losses:
        return None
    steps, values = history.valid()
    step = history.finish.get("best_step")
    if step is None and len(steps):
        step = int(steps[np.nanargmin(values)])
    return f"{losses['best']:.3f} at step {step}"


def failures_text(history: History) -> str:
    """How many failures there were, survived, and what they cost."""
    failures, restarts = sum(map(interrupts, history.all("failure"))), history.all("restart")
    unsaved = len(history.all("failure")) - failures
    kept = f"{unsaved} save{'' if unsaved == 1 else 's'} failed" if unsaved else ""
    if not failures:
        return kept or "none"
    lost = sum(int(event["lost_steps"]) for event in restarts)
    seconds = seconds_text(sum(as_float(event["restart_seconds"]) for event in restarts))
    redone = f"{lost} step{'' if lost == 1 else 's'} redone"
    survived = min(failures, len(restarts) + len(history.all("rollback")))
    said = f"{failures}, {survived} survived: {redone}, {seconds} of restarts"
    return f"{said}; {kept}" if kept else said


def alarms_text(history: History) -> str | None:
    """What alarms the routing raised and which of them are not over; None in a run without experts."""
    found = episodes(history.events)
    if not found:
        return "no alarm" if any(record.get("kind") == "window" for record in history.health) else None
    still = [
        f"{episode.kind.replace('_', ' ')} since step {episode.since}"
        for episode in found
        if episode.until is None
    ]
    number = f"{len(found)} alarm{'' if len(found) == 1 else 's'}"
    return f"{number}, all over" if not still else f"{number}; not over: {', '.join(still)}"


def _of(step: object, steps: object) -> str | None:
    return None if step is None else f"{step} of {steps}" if steps is not None else f"{step}"


def _maybe(value: float | None, show: Callable[[float], str]) -> str | None:
    return None if value is None else show(value)


def _median(history: History, name: str) -> str | None:
    values = history.series(name)[1]
    values = values[np.isfinite(values)]
    return percent_text(float(np.median(values))) if len(values) else None
