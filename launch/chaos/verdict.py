"""What became of the faults: from the marks that they left, and from the records of the two runs alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.chaos.draw import num_gone
from trainer.faults.kinds import Fault
from trainer.metrics.jsonl import read_events, read_metrics
from trainer.metrics.schema import EVENTS_FILE, METRICS_FILE, Record

_NOTICED = ("failure", "rollback", "stop", "restart")
_ALARMS = ("non_finite", "spike", "straggler")
"""Kinds of alarm by which a guard says that a step did not commit."""
_LOSSES = ("loss/train", "loss/valid")
TOLERANCE = 1e-5
"""Relative: what another order of fp32 sums may change in a loss."""


def read_marks(folder: Path) -> dict[int, Record]:
    """Index of a fault → {time, step, rank, …} of its strike, for those that struck."""
    marks = {}
    for path in folder.glob("[0-9]*.json"):
        if path.stem.isdigit() and (text := path.read_text()).endswith("\n"):
            marks[int(path.stem)] = json.loads(text)
    return marks


def judge(
    faults: Sequence[Fault], folder: Path, run: Path, reference: Path, finished: bool
) -> dict[str, Any]:
    """The verdict on a disturbed run.

    Args:
        folder: of the marks.
        run, reference: directories of the disturbed and of the undisturbed run.
        finished: whether the disturbed command came to its end.
    """
    marks = read_marks(folder)
    events, records = read_events(run / EVENTS_FILE), read_metrics(run / METRICS_FILE)
    reached = {int(record["step"]): float(record["time"]) for record in records}
    order = sorted(marks, key=lambda index: marks[index]["time"])
    ends = {index: marks[after]["time"] for index, after in itertools.pairwise(order)}
    judged = []
    for index, fault in enumerate(faults):
        facts: dict[str, Any] = {**asdict(fault), "injected": index in marks, "survived": False}
        if index in marks:
            until = ends.get(index, math.inf)
            since = [event for event in events if marks[index]["time"] <= event["time"] < until]
            facts |= _judge_one(marks[index], since, reached, finished)
        judged.append(facts)
    tolerance = TOLERANCE if num_gone(faults) else 0.0  # on fewer ranks sums have another order
    difference = first_difference(run, reference, tolerance)
    injected = [facts for facts in judged if facts["injected"]]
    seconds = [facts["recovery_seconds"] for facts in injected if facts["recovery_seconds"] is not None]
    return {
        "planned": len(faults),
        "injected": len(injected),
        "survived": sum(facts["survived"] for facts in injected),
        "finished": finished,
        "equal": finished and difference is None,
        "bit_identical": finished and first_difference(run, reference) is None,
        "tolerance": tolerance,
        "first_difference": difference,
        "largest_difference": largest_difference(run, reference),
        "goodput": next((e["goodput"] for e in reversed(events) if e["event"] == "finish"), None),
        "lost_steps": sum(facts["lost_steps"] for facts in injected),
        "recovery_seconds": spread(seconds),
        "by_kind": {
            kind: _of_kind([facts for facts in injected if facts["kind"] == kind])
            for kind in sorted({facts["kind"] for facts in injected})
        },
        "faults": judged,
    }


def _judge_one(
    mark: Record, events: Sequence[Record], reached: dict[int, float], finished: bool
) -> dict[str, Any]:
    """What happened from a fault to the next one.

    Recovery is the time from the strike to the end of the first step that ended after it was noticed and that was
    not done before the strike; only of faults that were noticed: the others cost no restart. A step that a worker
    finished between the two, before it was ended, is no sign of recovery.
    """
    noticed = next((event for event in events if _is_notice(event)), None)
    since = mark["time"] if noticed is None else noticed["time"]
    ends = [time for step, time in reached.items() if step > int(mark["step"]) and time > since]
    after = min(ends, default=None)
    lost = sum(int(event.get("lost_steps", 0)) for event in events if event["event"] == "restart")
    lost += sum(
        max(0, int(event["from_step"]) - int(event["step"]))
        for event in events
        if event["event"] == "rollback"
    )
    return {
        "step": int(mark["step"]),
        "time": mark["time"],
        "survived": finished or after is not None,
        "detected": None if noticed is None else noticed.get("kind", noticed["event"]),
        "detected_seconds": None if noticed is None else noticed["time"] - mark["time"],
        "lost_steps": lost,
        "recovery_seconds": None if noticed is None or after is None else after - mark["time"],
    }


def _is_notice(event: Record) -> bool:
    return event["event"] in _NOTICED or (event["event"] == "alarm" and event["kind"] in _ALARMS)


def _of_kind(faults: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [facts["recovery_seconds"] for facts in faults if facts["recovery_seconds"] is not None]
    return {
        "injected": len(faults),
        "survived": sum(facts["survived"] for facts in faults),
        "lost_steps": sum(facts["lost_steps"] for facts in faults),
        "recovery_seconds": spread(seconds),
    }


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and 99th percentile (nearest rank)."""
    if not seconds:
        return {"median": None, "p99": None}
    ranked = sorted(seconds)
    return {"median": median(ranked), "p99": ranked[math.ceil(0.99 * len(ranked)) - 1]}


def first_difference(run: Path, reference: Path, tolerance: float = 0.0) -> str | None:
    """Where two runs first differ: a logged loss, or the weights at the end. None: nowhere.

    Args:
        tolerance: relative, of losses; above 0 weights are not compared.
    """
    for step, name, mine, other in _pairs(run, reference):
        if not _relative(mine, other) <= tolerance:
            return f"{name} of step {step}: {mine}, undisturbed {other}"
    if tolerance:
        return None
    digests = [_digest(read_events(path / EVENTS_FILE)) for path in (run, reference)]
    if digests[0] is None or digests[0] != digests[1]:
        return f"weights at the end: {digests[0]}, undisturbed {digests[1]}"
    return None


def largest_difference(run: Path, reference: Path) -> float | None:
    """Of logged losses, relative to the reference's; None where one run has none, or none that is finite."""
    largest = max((_relative(mine, other) for _, _, mine, other in _pairs(run, reference)), default=0.0)
    return largest if math.isfinite(largest) else None


def _pairs(run: Path, reference: Path) -> Iterator[tuple[int, str, float | None, float | None]]:
    """(step, name, loss, loss of the reference) of every step that either has."""
    mine, other = (_losses(read_metrics(path / METRICS_FILE)) for path in (run, reference))
    for step in sorted(mine.keys() | other.keys()):
        for name in _LOSSES:
            yield step, name, mine.get(step, {}).get(name), other.get(step, {}).get(name)


def _relative(mine: float | None, other: float | None) -> float:
    if mine == other:
        return 0.0
    if mine is None or other is None:
        return math.inf
    if math.isnan(mine) and math.isnan(other):
        return 0.0
    return abs(mine - other) / abs(other) if other and math.isfinite(mine - other) else math.inf


def _losses(records: Iterable[Record]) -> dict[int, Record]:
    return {int(record["step"]): record for record in records}


def _digest(events: Sequence[Record]) -> str | None:
    return next((str(e["weights_digest"]) for e in reversed(events) if e["event"] == "finish"), None)


def show(verdict: dict[str, Any], console: Console) -> None:
    """Print a table by kind and the sums."""
    table = Table(box=None)
    for column in ("fault", "injected", "survived", "steps lost", "recovery (median)", "p99"):
        table.add_column(column, justify="left" if column == "fault" else "right", no_wrap=True)
    total = {key: verdict[key] for key in ("injected", "survived", "lost_steps", "recovery_seconds")}
    for kind, sums in (*verdict["by_kind"].items(), ("all", total)):
        times = (_seconds(sums["recovery_seconds"][name]) for name in ("median", "p99"))
        table.add_row(kind, *(str(sums[key]) for key in ("injected", "survived", "lost_steps")), *times)
    console.print(table)
    stood_in = [facts for facts in verdict["faults"] if facts["instead_of"]]
    if stood_in:
        pairs = sorted({f"{facts['kind']} for {facts['instead_of']}" for facts in stood_in})
        console.print(
            f"{len(stood_in)} fault(s) were stood in for: {', '.join(pairs)}.",
            markup=False,
            soft_wrap=True,
        )
    goodput = "–" if verdict["goodput"] is None else f"{verdict['goodput']:.1%}"
    same = "yes" if verdict["equal"] else f"NO ({verdict['first_difference'] or 'it did not finish'})"
    name, allowed = "bit-identical", verdict["tolerance"]
    if allowed:
        name = "equal        "
        same += f", losses differ by up to {verdict['largest_difference']} ({allowed:g} is rounding)"
    console.print(f"{name}  {same}\ngoodput        {goodput}", markup=False, soft_wrap=True)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
