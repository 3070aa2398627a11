"""Where the seconds of a run went, from its events and metrics alone.

A run is cut at its ``start`` events into generations. In each, every second is given to exactly one cause
(docs/metrics.md lists them); what no event explains is *other*, never silently useful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from trainer.metrics.schema import Record, number

CAUSES = ("useful", "startup", "checkpoint", "evaluation", "recompute", "restart", "other")


@dataclass
class Account:
    """Seconds by cause. ``stopped`` (no machine held) is outside of ``wall``."""

    useful: float = 0.0
    startup: float = 0.0
    checkpoint: float = 0.0
    evaluation: float = 0.0
    recompute: float = 0.0
    restart: float = 0.0
    other: float = 0.0
    stopped: float = 0.0

    @property
    def wall(self) -> float:
        """Seconds since the first start in which the run held its machines: the sum of all causes."""
        return sum(getattr(self, cause) for cause in CAUSES)

    @property
    def goodput(self) -> float:
        """Useful share of ``wall``, 0 to 1."""
        return self.useful / self.wall if self.wall > 0 else 0.0

    def add(self, part: Account) -> None:
        """Add another account's seconds to this one."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(part, item.name))


def account(events: Sequence[Record], records: Sequence[Record]) -> Account:
    """Give every second from the first ``start`` to the last sign of life to one cause.

    Args:
        events: events.jsonl in order of time.
        records: metrics.jsonl, each step once.
    """
    total = Account()
    generations = _generations(events, records)
    mean_step = _mean_step(records)
    after_failure = False
    for index, generation in enumerate(generations):
        following = generations[index + 1] if index + 1 < len(generations) else None
        total.add(_generation_account(generation, following, after_failure, mean_step))
        after_failure = generation.first("failure") is not None
    return total


@dataclass
class _Generation:
    """What happened from one start to the next; times in unix seconds."""

    start: float
    end: float
    first_step: int
    lost_steps: int
    """Steps of the generation before that this one computes again."""
    events: list[Record]
    records: list[Record]

    def first(self, *names: str) -> Record | None:
        return next((event for event in self.events if event["event"] in names), None)

    def waits(self, name: str, field: str, since: float = 0.0, until: float = math.inf) -> float:
        """Sum of a field of the events of one kind with since < time ≤ until."""
        return sum(
            number(e.get(field)) for e in self.events if e["event"] == name and since < e["time"] <= until
        )

    def all_waits(self, since: float, until: float) -> float:
        return self.waits("checkpoint", "stall_seconds", since, until) + self.waits(
            "evaluation", "seconds", since, until
        )


def _generations(events: Sequence[Record], records: Sequence[Record]) -> list[_Generation]:
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        return []
    last = max(record["time"] for record in (*events, *records))
    bounds = [*(start["time"] for start in starts), math.inf]
    restarts = [event for event in events if event["event"] == "restart"]
    generations, previous = [], -1
    for index, start in enumerate(starts):
        begin, until, generation = start["time"], bounds[index + 1], start["generation"]
        inside = [event for event in events if begin <= event["time"] < until]
        generations.append(
            _Generation(
                start=begin,
                end=min(until, last),
                first_step=next((int(e["step"]) for e in inside if e["event"] == "resume"), 0),
                lost_steps=sum(
                    int(e["lost_steps"]) for e in restarts if previous < e["generation"] <= generation
                ),
                events=inside,
                records=[record for record in records if begin <= record["time"] < until],
            )
        )
        previous = generation
    return generations


class _Purse:
    """The seconds of a generation. A cause takes at most what is left, so that the parts sum to the whole."""

    def __init__(self, seconds: float) -> None:
        self.left, self.account = seconds, Account()

    def take(self, cause: str, seconds: float) -> None:
        seconds = min(max(seconds, 0.0), self.left)
        self.left -= seconds
        setattr(self.account, cause, getattr(self.account, cause) + seconds)


def _generation_account(
    generation: _Generation, following: _Generation | None, after_failure: bool, mean_step: float
) -> Account:
    records, purse = generation.records, _Purse(generation.end - generation.start)
    last_logged = records[-1]["time"] if records else generation.start
    failure, stop = generation.first("failure"), generation.first("stop", "finish")
    until = generation.end
    if failure is not None:
        until = failure["time"]
        purse.take("restart", generation.end - until)
    elif stop is not None and following is not None:
        until = max(stop["time"], last_logged)
        purse.take("stopped", generation.end - until)
    purse.take("checkpoint", generation.waits("checkpoint", "stall_seconds"))
    purse.take("evaluation", generation.waits("evaluation", "seconds"))

    step, useful = generation.first_step, 0.0
    for record in records:
        useful += number(record.get("perf/step_seconds")) * max(0, record["step"] - step)
        step = record["step"]
    purse.take("useful", useful)
    if failure is not None and following is not None:
        # Steps that a checkpoint kept before they were logged, and those that no checkpoint kept.
        saved = max((e["step"] for e in generation.events if e["event"] == "checkpoint"), default=0)
        kept = mean_step * max(0, min(following.first_step, saved) - step)
        redone = mean_step * following.lost_steps
        purse.take("useful", kept)
        purse.take("recompute", redone)
        if records:
            unseen = until - last_logged - generation.all_waits(last_logged, until) - kept - redone
            purse.take("restart", unseen)
    lead = purse.left
    if records:
        first = records[0]
        steps = max(0, first["step"] - generation.first_step)
        lead = first["time"] - generation.start - number(first.get("perf/step_seconds")) * steps
        lead -= generation.all_waits(0.0, first["time"])
    purse.take("restart" if after_failure else "startup", lead)
    purse.take("other", purse.left)
    return purse.account


def _mean_step(records: Sequence[Record]) -> float:
    seconds = [number(record.get("perf/step_seconds")) for record in records]
    return sum(seconds) / len(seconds) if seconds else 0.0


class GoodputMeter:
    """The ``ft/…`` metrics while a run goes on, at constant cost a step.

    Args:
        events, records: the run's files as they are after ``truncate_after``, with the ``start`` and
            ``resume`` of this generation in them.
    """

    def __init__(self, events: Sequence[Record], records: Sequence[Record]) -> None:
        so_far = account(events, records)
        self._useful, self._stopped = so_far.useful, so_far.stopped
        self._first_start = next((event["time"] for event in events if event["event"] == "start"), None)
        self._lost_steps, self._restart_seconds, self._stall_seconds = 0, 0.0, 0.0
        for event in events:
            self.event(event)

    def event(self, event: Record) -> None:
        """Count an event."""
        if event["event"] == "restart":
            self._lost_steps += int(event["lost_steps"])
            self._restart_seconds += number(event["restart_seconds"])
        elif event["event"] == "checkpoint":
            self._stall_seconds += number(event["stall_seconds"])

    def steps(self, seconds: float) -> None:
        """Count the wall seconds of one or more committed steps."""
        self._useful += seconds

    def metrics(self, now: float) -> dict[str, float]:
        """The four ``ft/…`` metrics at a unix time."""
        wall = now - self._first_start - self._stopped if self._first_start is not None else 0.0
        return {
            "ft/goodput": min(1.0, self._useful / wall) if wall > 0 else 0.0,
            "ft/lost_steps": self._lost_steps,
            "ft/restart_seconds": self._restart_seconds,
            "ft/checkpoint_stall_seconds": self._stall_seconds,
        }
